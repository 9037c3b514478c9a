// The three products of training against sums in double precision, and the threads that they run on.
#include "training.hpp"

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "plain.hpp"
#include "pool.hpp"

using namespace sparse_cpu;
using namespace plain;
using check::Chance;

namespace {

const Kernels& kernels = best_kernels();

struct Layer {
  Layer(Chance& chance, uint32_t rows, uint32_t columns, double density)
      : weight(random_matrix(chance, rows, columns, Values::kFloat32, density, 0.3f)), bias(random_vector(chance, rows)) {
    for (const float w : weight.raw) dead.push_back(w == 0.0f);
  }
  Matrix weight;
  std::vector<float> bias;
  std::vector<uint8_t> dead;
};

struct Found {
  std::vector<float> y, dx, dweight;
  bool operator==(const Found& other) const { return y == other.y && dx == other.dx && dweight == other.dweight; }
};

Found computed(const TrainingProducts& products, const Layer& layer, const std::vector<float>& x,
               const std::vector<float>& dy, size_t n, const Lender& lender, size_t threads = 1) {
  Found found{std::vector<float>(n * layer.weight.rows, -7.0f), std::vector<float>(n * layer.weight.columns, -7.0f),
              std::vector<float>(layer.weight.raw.size(), -7.0f)};
  std::vector<float> tiles(products.tile_size(n, kernels));
  const float* const weight = layer.weight.raw.data();
  products.forward(weight, layer.bias.data(), x.data(), n, tiles.data(), found.y.data(), kernels, lender, threads);
  products.backward(weight, dy.data(), n, tiles.data(), found.dx.data(), found.dweight.data(), kernels, lender, threads);
  return found;
}

void held_against_double(Chance& chance, const Layer& layer, size_t n) {
  const uint32_t rows = layer.weight.rows, columns = layer.weight.columns;
  const std::vector<float> x = random_vector(chance, n * columns), dy = random_vector(chance, n * rows);
  std::vector<double> y(n * rows), dx(n * columns, 0), dweight(size_t(rows) * columns, 0);
  for (size_t i = 0; i < n; i++)
    for (uint32_t r = 0; r < rows; r++) {
      y[i * rows + r] = layer.bias[r];
      for (uint32_t c = 0; c < columns; c++) {
        if (layer.dead[r * columns + c]) continue;
        y[i * rows + r] += double(layer.weight.at(r, c)) * x[i * columns + c];
        dx[i * columns + c] += double(layer.weight.at(r, c)) * dy[i * rows + r];
        dweight[r * columns + c] += double(dy[i * rows + r]) * x[i * columns + c];
      }
    }
  const TrainingProducts products(layer.dead.data(), rows, columns);
  check::where = std::to_string(rows) + " x " + std::to_string(columns) + " of " + std::to_string(n);
  Threads one;
  const Found found = computed(products, layer, x, dy, n, one);
  CHECK_CLOSE(found.y, y, 3e-6);
  CHECK_CLOSE(found.dx, dx, 3e-6);
  CHECK_CLOSE(found.dweight, dweight, 2e-5);
  for (size_t i = 0; i < dweight.size(); i++) CHECK(!layer.dead[i] || found.dweight[i] == 0.0f);
}

void odd_shapes() {
  Chance chance(1);
  const std::pair<uint32_t, uint32_t> shapes[] = {{1, 1}, {7, 1}, {1, 9}, {13, 194}, {193, 20}, {50, 61}};
  for (const auto& [rows, columns] : shapes)
    for (const double density : {0.0, 0.1, 0.5, 1.0}) {
      const Layer layer(chance, rows, columns, density);
      for (const size_t n : {1, 15, 16, 33, 65, 200}) held_against_double(chance, layer, n);
    }
}

void empty_rows_and_columns() {
  Chance chance(2);
  Layer layer(chance, 210, 200, 0.3);
  for (uint32_t r = 0; r < 210; r++)
    for (uint32_t c = 0; c < 200; c++)
      if ((r % 5 == 0 || c % 3 == 0 || r < 9) && r != 209) layer.dead[r * 200 + c] = 1, layer.weight.raw[r * 200 + c] = 0;
  for (const size_t n : {5, 70}) held_against_double(chance, layer, n);
}

// A live weight may be zero, and a product be asked for alone.
void parts_of_it() {
  Chance chance(3);
  Layer layer(chance, 20, 30, 0.5);
  const TrainingProducts products(layer.dead.data(), 20, 30);
  std::fill(layer.weight.raw.begin(), layer.weight.raw.end(), 0.0f);
  const std::vector<float> x = random_vector(chance, 40 * 30), dy = random_vector(chance, 40 * 20);
  Threads one;
  const Found all = computed(products, layer, x, dy, 40, one);
  std::vector<float> y(40 * 20, 1), dx(40 * 30, 1), dweight(20 * 30, 1), tiles(products.tile_size(40, kernels));
  const float* const weight = layer.weight.raw.data();
  products.forward(weight, nullptr, x.data(), 40, nullptr, y.data(), kernels, one, 1);
  CHECK(y == std::vector<float>(40 * 20, 0));
  products.backward(weight, dy.data(), 40, nullptr, dx.data(), nullptr, kernels, one, 1);
  CHECK(dx == all.dx);
  products.forward(weight, nullptr, x.data(), 40, tiles.data(), y.data(), kernels, one, 1);
  products.backward(weight, dy.data(), 40, tiles.data(), nullptr, dweight.data(), kernels, one, 1);
  CHECK(dweight == all.dweight);
  products.forward(weight, nullptr, nullptr, 0, nullptr, nullptr, kernels, one, 1);
  products.backward(weight, nullptr, 0, tiles.data(), nullptr, dweight.data(), kernels, one, 1);
  CHECK(dweight == std::vector<float>(20 * 30, 0));
}

struct Case {
  explicit Case(uint64_t seed) : chance(seed), layer(chance, 250, 210, 0.1), products(layer.dead.data(), 250, 210) {
    x = random_vector(chance, n * 210);
    dy = random_vector(chance, n * 250);
  }
  Found run(size_t threads) const { return computed(products, layer, x, dy, n, Pool(threads), threads); }

  static constexpr size_t n = 150;
  Chance chance;
  Layer layer;
  TrainingProducts products;
  std::vector<float> x, dy;
};

void same_bits_for_all_threads() {
  const Case made(4);
  const Found expected = made.run(1);
  for (const size_t threads : {2, 3, 8, 2, 1}) CHECK(made.run(threads) == expected);
}

void two_callers_at_once() {
  const Case made(5);
  const Found expected = made.run(1);
  std::vector<std::thread> callers;
  std::atomic<int> same{0};
  for (int c = 0; c < 3; c++)
    callers.emplace_back([&] {
      for (int again = 0; again < 10; again++) same += made.run(2) == expected;
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(same == 30);
}

void what_fails_in_a_thread_is_thrown_here() {
  for (int again = 0; again < 20; again++) {
    const std::vector<Phase> phases = {{40, [](size_t i, size_t) {
                                          if (i == 30) throw std::runtime_error("thirty");
                                        }}};
    CHECK_REFUSED(std::runtime_error, Team::run(phases, Pool(3), 3), "thirty");
  }
}

void a_forked_child() {
#if !defined(_WIN32)
  const Case made(6);
  const Found expected = made.run(3);
  const pid_t child = fork();
  if (child == 0) _exit(made.run(3) == expected ? 0 : 1);
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  CHECK(made.run(3) == expected);
#endif
}

}  // namespace

int main(int count, char** arguments) {
  return check::run({{"odd shapes", odd_shapes},
                     {"empty rows and columns", empty_rows_and_columns},
                     {"parts of it", parts_of_it},
                     {"same bits for all threads", same_bits_for_all_threads},
                     {"two callers at once", two_callers_at_once},
                     {"what fails in threads is thrown here", what_fails_in_a_thread_is_thrown_here},
                     {"a forked child", a_forked_child}},
                    count, arguments);
}
