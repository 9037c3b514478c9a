// Sparse and dense products of every odd shape, against sums in double precision.
#include "linear.hpp"

#include "machine.hpp"
#include "plain.hpp"

using namespace sparse_cpu;
using namespace plain;
using check::Chance;

namespace {

const Machine engine = best_machine();
const Kernels& kernels = engine.floats;
constexpr Activation kActivations[] = {Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kGeluTanh};

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::kRelu: return x > 0 ? x : 0;
    case Activation::kGelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    default: return x;
  }
}

std::vector<double> product(const Matrix& w, const std::vector<float>& bias, const std::vector<float>& x, size_t n) {
  std::vector<double> y(n * w.rows);
  for (size_t r = 0; r < w.rows; r++) {
    std::vector<std::pair<size_t, double>> row;
    for (size_t c = 0; c < w.columns; c++)
      if (w.at(r, c) != 0.0f) row.emplace_back(c, w.at(r, c));
    for (size_t i = 0; i < n; i++) {
      double sum = bias[r];
      for (const auto& [c, weight] : row) sum += weight * x[i * w.columns + c];
      y[i * w.rows + r] = sum;
    }
  }
  return y;
}

LinearWeights blocked(const Matrix& m, const std::vector<float>& bias) {
  const Bytes bytes = pack(m, 2);
  return LinearWeights(open(bytes.data(), bytes.size(), "weight"), bias, engine);
}

// Weights that end where their memory ends, so that the address sanitizer sees each read beyond.
struct Tight {
  explicit Tight(LinearWeights& matrix) : place(std::aligned_alloc(kAlignment, matrix.bytes())) {
    matrix.move_to(static_cast<uint8_t*>(place));
  }
  ~Tight() { std::free(place); }
  void* place;
};

std::vector<float> multiplied(const LinearWeights& matrix, Activation activation, const std::vector<float>& x, size_t n,
                              Lender lender) {
  std::vector<float> y(n * matrix.rows(), -77.0f);
  linear(matrix, activation, x.data(), n, y.data(), engine, lender);
  return y;
}

void held_against_double(Chance& chance, uint32_t rows, uint32_t columns, double density,
                         const std::vector<size_t>& sizes) {
  const Matrix m = random_matrix(chance, rows, columns, Values::kFloat32, density, 1 / std::sqrt(float(columns) + 1));
  const std::vector<float> bias = random_vector(chance, rows);
  LinearWeights matrix = blocked(m, bias);
  const auto zeros = double(std::count(m.raw.begin(), m.raw.end(), 0.0f));
  CHECK(matrix.single().dense() == (1 - zeros / double(m.raw.size()) > kernels.dense_above));
  const Tight tight(matrix);
  for (const size_t n : sizes) {
    const std::vector<float> x = random_vector(chance, n * columns);
    const std::vector<double> sums = product(m, bias, x, n);
    for (const unsigned cores : {1u, 64u}) {  // tiles are shared, or their rows are
      machine::cores = cores;
      Threads one;
      for (const Activation activation : kActivations) {
        if (activation != Activation::kNone && (n > 64 || cores == 64)) continue;
        std::vector<double> expected = sums;
        for (double& y : expected) y = activated(activation, y);
        check::where = "product " + std::to_string(rows) + " x " + std::to_string(columns) + " of " + std::to_string(n);
        CHECK_CLOSE(multiplied(matrix, activation, x, n, one), expected, 3e-6);
      }
    }
  }
}

void odd_shapes() {
  Chance chance(1);
  const std::vector<size_t> few = {1, 3, 15, 16, 17, 63, 64, 65};
  const std::pair<uint32_t, uint32_t> shapes[] = {{1, 1},    {1, 7},     {7, 1},     {2, 193},  {8, 192},  {9, 20},
                                                  {13, 400}, {192, 192}, {193, 191}, {200, 50}, {385, 36}, {30, 577}};
  for (const auto& [rows, columns] : shapes)
    for (const double density : {0.0, 0.1, 0.5, 1.0}) held_against_double(chance, rows, columns, density, few);
}

void wide_batches() {
  Chance chance(2);
  for (const double density : {0.1, 1.0}) {
    held_against_double(chance, 201, 197, density, {512});
    held_against_double(chance, 3, 5, density, {1000});
  }
}

// Rows and whole blocks without a weight, beside full ones.
void empty_rows_and_blocks() {
  Chance chance(3);
  Matrix m = random_matrix(chance, 400, 400, Values::kFloat32, 0.2, 0.1f);
  for (size_t r = 0; r < 400; r++)
    for (size_t c = 0; c < 400; c++) {
      float& x = m.raw[r * 400 + c];
      if (r % 5 == 0 || (r >= 192 && r < 384 && c >= 192) || (r < 8 && c < 192)) x = 0;
      if (r == 399) x = 0.05f;
    }
  const std::vector<float> bias = random_vector(chance, 400);
  const LinearWeights matrix = blocked(m, bias);
  Threads one;
  for (const size_t n : {1, 17, 65}) {
    const std::vector<float> x = random_vector(chance, n * 400);
    CHECK_CLOSE(multiplied(matrix, Activation::kNone, x, n, one), product(m, bias, x, n), 3e-6);
  }
}

void nothing_at_all() {
  const LinearWeights matrix = blocked({2, 2, Values::kFloat32, {1, 0, 0, 1}, {}}, {0, 0});
  Threads one;
  float untouched = 5;
  linear(matrix, Activation::kNone, nullptr, 0, &untouched, engine, one);
  CHECK(untouched == 5);
}

// The order of each sum depends neither on how a batch is split nor on the thread.
void same_bits_for_all_threads() {
  Chance chance(4);
  for (const double density : {0.15, 1.0}) {
    const Matrix m = random_matrix(chance, 400, 300, Values::kFloat32, density, 0.1f);
    const LinearWeights matrix = blocked(m, random_vector(chance, 400));
    for (const size_t n : {1, 17, 64, 65, 300}) {
      const std::vector<float> x = random_vector(chance, n * 300);
      machine::cores = 1;
      Threads one;
      const std::vector<float> expected = multiplied(matrix, Activation::kGelu, x, n, one);
      for (const unsigned cores : {1u, 2u, 3u, 8u, 64u})
        for (const size_t threads : {1, 2, 3, 8}) {
          machine::cores = cores;
          Threads some{threads};
          CHECK(multiplied(matrix, Activation::kGelu, x, n, some) == expected);
        }
    }
  }
}

void two_callers_at_once() {
  Chance chance(5);
  machine::cores = 4;
  const LinearWeights matrix =
      blocked(random_matrix(chance, 250, 210, Values::kFloat32, 0.2, 0.1f), random_vector(chance, 250));
  std::vector<std::vector<float>> x, expected, found(2);
  Threads one;
  for (const size_t n : {20, 90}) {
    x.push_back(random_vector(chance, n * 210));
    expected.push_back(multiplied(matrix, Activation::kRelu, x.back(), n, one));
  }
  std::vector<std::thread> callers;
  for (size_t c = 0; c < 2; c++)
    callers.emplace_back([&, c] {
      for (int again = 0; again < 10; again++) {
        Threads two{2};
        found[c] = multiplied(matrix, Activation::kRelu, x[c], x[c].size() / 210, two);
      }
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(found == expected);
}

}  // namespace

int main(int count, char** arguments) {
  return check::run({{"odd shapes", odd_shapes},
                     {"wide batches", wide_batches},
                     {"empty rows and blocks", empty_rows_and_blocks},
                     {"nothing at all", nothing_at_all},
                     {"same bits for all threads", same_bits_for_all_threads},
                     {"two callers at once", two_callers_at_once}},
                    count, arguments);
}
