// How fast single products are inside the encoder, against this core's peak, and from which density on the dense kernel
// wins. One thread, best of many rounds, activations and weights warm.
//
//   cmake -S plugins/spdtool-sparse-cpu -B build/products -DSPARSE_CPU_BENCHMARKS=ON
//   cmake --build build/products && build/products/cpp/benchmarks/products
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <random>

#include "../blocked.hpp"
#include "../buffer.hpp"

using namespace sparse_cpu;

namespace {

double best_seconds(const std::function<void()>& work) {
  using clock = std::chrono::steady_clock;
  double best = 1e9;
  const auto begin = clock::now();
  for (int round = 0; round < 20 || clock::now() - begin < std::chrono::milliseconds(150); round++) {
    const auto start = clock::now();
    work();
    best = std::min(best, std::chrono::duration<double>(clock::now() - start).count());
  }
  return best;
}

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

// GFLOP/s of real (nonzero) arithmetic on `tokens` columns.
double rate(const BlockedMatrix& matrix, size_t tokens, double& seconds) {
  const Kernels& kernels = best_kernels();
  const int vectors = std::min<int>(kWidestTile, int(tokens / kernels.lanes));
  const size_t width = size_t(vectors) * kernels.lanes, tiles = tokens / width;
  Buffer<float> x(tiles * width * matrix.columns()), y(tiles * width * matrix.rows());
  for (size_t i = 0; i < x.size(); i++) x[i] = float(i % 7);
  seconds = best_seconds([&] {
    for (size_t t = 0; t < tiles; t++)
      kernels.multiply(matrix.view(), 0, matrix.block(matrix.row_blocks()), {x.data() + t * width * matrix.columns(), 0},
                       {y.data() + t * width * matrix.rows(), 0}, vectors);
  });
  return 2e-9 * double(matrix.nonzeros()) * double(tiles * width) / seconds;
}

}  // namespace

int main() {
  std::printf("kernels: %s\n\n| matrix | tokens | zeros | us | real GFLOP/s | times as fast as all weights |\n", best_kernels().name);
  std::printf("|---|---|---|---|---|---|\n");
  const uint32_t shapes[][2] = {{384, 384}, {1536, 384}, {384, 1536}, {768, 768}, {3072, 768}, {768, 3072}};
  for (const auto& shape : shapes)
    for (const size_t tokens : {size_t(32), size_t(128)}) {
      double whole = 0, seconds = 0;
      const BlockedMatrix dense(random_rows(shape[0], shape[1], 1.0), std::vector<float>(shape[0]), 0.5);
      const double dense_rate = rate(dense, tokens, whole);
      std::printf("| %u x %u | %zu | none | %.1f | %.1f | 1 |\n", shape[0], shape[1], tokens, whole * 1e6, dense_rate);
      for (const double zeros : {0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1}) {
        const BlockedMatrix sparse(random_rows(shape[0], shape[1], 1 - zeros), std::vector<float>(shape[0]), 1.0);
        const double real = rate(sparse, tokens, seconds);
        std::printf("| %u x %u | %zu | %.0f %% | %.1f | %.1f | %.2f |\n", shape[0], shape[1], tokens, zeros * 100,
                    seconds * 1e6, real, whole / seconds);
      }
    }
}
