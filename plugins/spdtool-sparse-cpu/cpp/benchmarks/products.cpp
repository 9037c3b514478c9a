// How fast single products are inside the encoder, against this core's peak, and from which density on the dense kernel
// wins. One thread, best of many rounds, activations and weights warm.
//
//   cmake -S plugins/spdtool-sparse-cpu -B build/products -DSPARSE_CPU_BENCHMARKS=ON
//   cmake --build build/products && build/products/cpp/benchmarks/products
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>

#include "../linear.hpp"

using namespace sparse_cpu;

namespace {

SparseRows random_rows(uint32_t rows, uint32_t columns, double density) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform;
  SparseRows result{rows, columns, {0}, {}, {}};
  for (uint32_t r = 0; r < rows; r++) {
    for (uint32_t c = 0; c < columns; c++)
      if (uniform(random) < density) {
        result.column.push_back(uint16_t(c));
        result.value.push_back(uniform(random) - 0.5f);
      }
    result.start.push_back(uint32_t(result.value.size()));
  }
  return result;
}

// Best seconds of many products, so many at a time that a turn takes about a millisecond.
double best_seconds(const LinearWeights& matrix, size_t tokens) {
  const size_t repeats = 1 + size_t(1e-3 / product_seconds(matrix, tokens, 3, best_machine()));
  double best = 1e9;
  for (int turn = 0; turn < 60; turn++) best = std::min(best, product_seconds(matrix, tokens, repeats, best_machine()));
  return best;
}

}  // namespace

int main() {
  std::printf("kernels: %s\n\n| matrix | tokens | zeros | us | real GFLOP/s | times as fast as all weights |\n", best_kernels().name);
  std::printf("|---|---|---|---|---|---|\n");
  const uint32_t shapes[][2] = {{384, 384}, {1536, 384}, {384, 1536}, {768, 768}, {3072, 768}, {768, 3072}};
  for (const auto& shape : shapes)
    for (const size_t tokens : {size_t(32), size_t(128)}) {
      const std::vector<float> bias(shape[0]);
      const auto row = [&](double density, double dense_above, double dense_seconds) {
        const LinearWeights matrix(BlockedMatrix(random_rows(shape[0], shape[1], density), bias, dense_above));
        const double seconds = best_seconds(matrix, tokens), real = 2e-9 * double(matrix.single().nonzeros() * tokens) / seconds;
        std::printf("| %u x %u | %zu | %.0f %% | %.1f | %.1f | %.2f |\n", shape[0], shape[1], tokens,
                    100 * (1 - density), seconds * 1e6, real, dense_seconds / seconds);
        return seconds;
      };
      const double dense_seconds = row(1.0, 0.5, NAN);
      for (const double zeros : {0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1}) row(1 - zeros, 1.0, dense_seconds);
    }
}
