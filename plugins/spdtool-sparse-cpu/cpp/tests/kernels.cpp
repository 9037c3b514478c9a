// The inner loops one by one, in the instruction set that SPDTOOL_SPARSE_CPU_ISA asks for.
#include "kernels.hpp"

#include <cstdlib>

#include "plain.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace sparse_cpu;
using namespace plain;
using check::Chance;

namespace {

const Kernels& kernels = best_kernels();

double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }
double gelu_tanh(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

void activations() {
  std::vector<float> x;
  for (int i = -4000; i <= 4000; i++) x.push_back(float(i) / 250);
  for (const float far : {-1e4f, -100.0f, -60.0f, -20.0f, 20.0f, 60.0f, 100.0f, 1e4f}) x.push_back(far);
  const auto held_against = [&](Activation activation, double (*exact)(double), double tolerance) {
    for (size_t size = x.size() - 40; size <= x.size(); size++) {  // every remainder of the lanes
      std::vector<float> found(x.begin(), x.begin() + long(size));
      kernels.activate(activation, found.data(), size);
      double most = 0;
      for (size_t i = 0; i < size; i++)
        most = std::max(most, std::fabs(found[i] - exact(x[i])) / (1 + std::fabs(double(x[i]))));
      CHECK(most <= tolerance);
    }
  };
  held_against(Activation::kNone, [](double v) { return v; }, 0);
  held_against(Activation::kRelu, [](double v) { return v > 0 ? v : 0; }, 0);
  held_against(Activation::kGelu, gelu, 5e-7);
  held_against(Activation::kGeluTanh, gelu_tanh, 5e-7);
}

void rows_of_tables() {
  Chance chance(1);
  for (const size_t size : {1, 3, 15, 16, 17, 64, 100}) {
    const std::vector<float> before = random_vector(chance, size);
    std::vector<float> sum = before, expected = before;
    const std::vector<float> row = random_vector(chance, size);
    kernels.add_float(sum.data(), reinterpret_cast<const uint8_t*>(row.data()), size);
    for (size_t i = 0; i < size; i++) expected[i] += row[i];
    CHECK(sum == expected);

    Bytes bytes(size);
    for (uint8_t& b : bytes) b = uint8_t(chance.bits());
    sum = before;
    std::vector<double> exact(before.begin(), before.end());
    kernels.add_int8(sum.data(), bytes.data(), size, 0.01f);
    for (size_t i = 0; i < size; i++) exact[i] += double(int8_t(bytes[i])) * double(0.01f);
    CHECK_CLOSE(sum, exact, 1e-6);
  }
  for (const uint32_t size : {4, 12, 64, 68, 400}) {
    const Matrix table = random_matrix(chance, 1, size, Values::kInt6, 0.9);
    const Bytes packed = pack(table, 0);
    std::vector<float> sum = random_vector(chance, size);
    std::vector<double> exact(sum.begin(), sum.end());
    for (size_t i = 0; i < size; i++) exact[i] += double(table.at(0, i));
    kernels.add_int6(sum.data(), packed.data() + 68, size, table.scales[0]);
    CHECK_CLOSE(sum, exact, 1e-6);
  }
}

// All float16 numbers that are finite, and again where the session takes subnormal numbers for zero.
void every_half() {
  std::vector<uint16_t> bits;
  for (uint32_t b = 0; b < 65536; b++)
    if ((b & 0x7c00) != 0x7c00) bits.push_back(uint16_t(b));
  std::vector<float> expected;
  for (const uint16_t b : bits) expected.push_back(half_to_float(b));
  std::vector<float> sum(bits.size(), 0.0f);
  kernels.add_half(sum.data(), reinterpret_cast<const uint8_t*>(bits.data()), bits.size());
  CHECK(sum == expected);
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  std::fill(sum.begin(), sum.end(), 0.0f);
  kernels.add_half(sum.data(), reinterpret_cast<const uint8_t*>(bits.data()), bits.size());
  _mm_setcsr(before);
  CHECK(sum == expected);
#endif
}

void tiles_and_back() {
  Chance chance(2);
  for (int vectors = 1; vectors <= kWidestTile; vectors++)
    for (const size_t size : {1, 2, 3, 4, 5, 8, 33}) {
      const size_t width = size_t(vectors * kernels.lanes);
      std::vector<std::vector<float>> rows(width), back(width, std::vector<float>(size, 7.0f));
      std::vector<const float*> from(width, nullptr);
      std::vector<float*> to(width, nullptr);
      for (size_t c = 0; c < width; c++) {
        rows[c] = random_vector(chance, size);
        if (c % 3 != 1) from[c] = rows[c].data(), to[c] = back[c].data();
      }
      std::vector<float> tile(size * width, 9.0f);
      kernels.into_tile(from.data(), width, size, tile.data());
      for (size_t c = 0; c < width; c++)
        for (size_t i = 0; i < size; i++) CHECK(tile[i * width + c] == (from[c] ? rows[c][i] : 0.0f));
      kernels.out_of_tile(tile.data(), width, size, to.data());
      for (size_t c = 0; c < width; c++) CHECK(back[c] == (to[c] ? rows[c] : std::vector<float>(size, 7.0f)));
    }
}

void layer_norms() {
  Chance chance(3);
  for (int vectors = 1; vectors <= kWidestTile; vectors++)
    for (const size_t rows : {1, 7, 20, 100})
      for (const bool add : {false, true}) {
        const size_t width = size_t(vectors * kernels.lanes);
        std::vector<float> x = random_vector(chance, rows * width, 0.3f), y = random_vector(chance, rows * width);
        const std::vector<float> gain = random_vector(chance, rows, 1.0f), bias = random_vector(chance, rows);
        std::vector<float> range(2 * width, 77.0f);
        std::vector<double> expected(rows * width);
        for (size_t c = 0; c < width; c++) {
          double mean = 0, square = 0;
          const auto at = [&](size_t r) { return double(x[r * width + c]) + (add ? double(y[r * width + c]) : 0); };
          for (size_t r = 0; r < rows; r++) mean += at(r) / double(rows);
          for (size_t r = 0; r < rows; r++) square += (at(r) - mean) * (at(r) - mean) / double(rows);
          for (size_t r = 0; r < rows; r++)
            expected[r * width + c] = (at(r) - mean) / std::sqrt(square + 1e-5) * gain[r] + bias[r];
        }
        kernels.add_layer_norm(x.data(), add ? y.data() : nullptr, x.data(), rows, vectors, gain.data(), bias.data(), 1e-5f,
                               range.data());
        CHECK_CLOSE(x, expected, 1e-5);
        for (size_t c = 0; c < width; c++) {
          float least = 0, most = 0;
          for (size_t r = 0; r < rows; r++)
            least = std::min(least, x[r * width + c]), most = std::max(most, x[r * width + c]);
          CHECK(range[c] == least && range[width + c] == most);
        }
      }
}

void asked_for() {
  const char* name = std::getenv("SPDTOOL_SPARSE_CPU_ISA");
  std::printf("kernels: %s of %s\n", kernels.name, name ? name : "the best");
#if defined(__x86_64__)
  const std::string wanted = name ? name : "";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wanted == "baseline") CHECK(std::string(kernels.name) == "baseline");
  if (wanted == "avx2") CHECK(std::string(kernels.name) == (avx2 ? "avx2" : "baseline"));
  if (wanted == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
    CHECK(std::string(kernels.name) == "avx512");
#endif
}

}  // namespace

int main(int count, char** arguments) {
  return check::run({{"the instruction set asked for", asked_for},
                     {"activations", activations},
                     {"rows of tables", rows_of_tables},
                     {"every half", every_half},
                     {"tiles and back", tiles_and_back},
                     {"layer norms", layer_norms}},
                    count, arguments);
}
