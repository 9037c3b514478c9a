// A weight matrix in the form that the kernels multiply.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "packed.hpp"

namespace sparse_cpu {

// Keeps the weights of one matrix [rows][columns] in blocks of kRowsOfBlock x kDepthOfBlock, row blocks outermost, and
// its bias. See Block in kernels.hpp for the order of the weights in a block.
class BlockedMatrix {
 public:
  BlockedMatrix() = default;

  // `bias` has one number for each row; `scale` multiplies weights and bias. Above a density of `dense_above` every weight
  // is kept, zeros among them, for the kernel that reads no indexes.
  BlockedMatrix(const SparseRows& weights, const std::vector<float>& bias, double dense_above, float scale = 1.0f);

  uint32_t rows() const { return rows_; }
  uint32_t columns() const { return columns_; }
  uint32_t row_blocks() const { return row_blocks_; }
  uint32_t depth_blocks() const { return depth_blocks_; }
  bool dense() const { return dense_; }
  size_t nonzeros() const { return nonzeros_; }

  MatrixView view() const;

  // Bytes that the kernels read for a product, and a move of them to `place`, which must be aligned and outlive the matrix:
  // the matrices of a model then lie side by side on huge pages. Returns the end.
  size_t bytes() const;
  uint8_t* move_to(uint8_t* place);

  // The first of the blocks of row block `row`; the one of depth block d is d further.
  size_t block(uint32_t row) const { return size_t(row) * depth_blocks_; }

  // The rows [first_row(b), first_row(b + 1)) are those of row block b.
  uint32_t first_row(uint32_t row_block) const;

 private:
  void add_block(const SparseRows& weights, uint32_t row, uint32_t depth, std::vector<uint32_t>& cursor);

  uint32_t rows_ = 0, columns_ = 0, row_blocks_ = 0, depth_blocks_ = 0;
  size_t nonzeros_ = 0;
  bool dense_ = false;
  std::vector<Block> blocks_;
  std::vector<Run> runs_;
  std::vector<uint16_t> order_;
  std::vector<uint8_t> index_;  // empty after a move
  std::vector<float> value_, bias_;
  uint8_t* moved_index_ = nullptr;
  float* moved_value_ = nullptr;
};

}  // namespace sparse_cpu
