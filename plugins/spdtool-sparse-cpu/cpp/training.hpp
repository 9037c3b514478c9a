// The three products of a linear layer in training, over its live weights alone.
#pragma once

#include <vector>

#include "blocked.hpp"
#include "buffer.hpp"
#include "team.hpp"
#include "tiles.hpp"

namespace sparse_cpu {

// The live weights of a matrix [rows][columns] as two patterns, of the matrix and of its transpose. The weights themselves
// are gathered from the dense matrix at every call. Safe to call from several threads at once; the order of each sum does
// not depend on the number of threads.
class TrainingProducts {
 public:
  // `dead` has a byte for each weight, row by row. At most 65,536 rows and columns, and fewer than 2^32 weights.
  TrainingProducts(const uint8_t* dead, uint32_t rows, uint32_t columns);

  uint32_t rows() const { return forward_.pattern.rows(); }
  uint32_t columns() const { return forward_.pattern.columns(); }

  // y[n][rows] = x[n][columns] W^T + bias, which may be null. `tiles`, of tile_size(n) numbers, receives `x` in tiles, for the
  // weight gradient; null: not stored. Uses at most `threads` threads.
  void forward(const float* weight, const float* bias, const float* x, size_t n, float* tiles, float* y,
               const Kernels& kernels, const Lender& lender, size_t threads) const;

  // From dy[n][rows]: dx[n][columns] = dy W, and dweight[rows][columns] = dy^T x where weights are alive, zero elsewhere.
  // Either may be null; `tiles` comes from `forward`.
  void backward(const float* weight, const float* dy, size_t n, const float* tiles, float* dx, float* dweight,
                const Kernels& kernels, const Lender& lender, size_t threads) const;

  size_t tile_size(size_t n, const Kernels& kernels) const { return Tiles(n, kernels.lanes, 1).columns() * columns(); }

 private:
  struct Side {
    BlockedPattern pattern;
    std::vector<uint32_t> place;  // for each entry 1 + where its weight stands in the dense matrix, or 0
  };

  // Rows of a batch, their tiles (to be filled), and what comes out of the product with one side.
  struct Batch {
    const Tiles& tiles;
    const float* rows;
    size_t n;
    float* in;
    float* out;  // null: only the tiles are filled
  };

  static void gather(const Side& side, uint32_t row_block, const float* weight, float* value);
  static void multiply(const Side& side, const float* value, const float* bias, const Batch& batch, size_t tile,
                       const Kernels& kernels);
  void sample(size_t begin, size_t end, const float* x, const float* dy, const Tiles& tiles, float* dweight,
              const Kernels& kernels) const;

  Side forward_, backward_;
};

}  // namespace sparse_cpu
