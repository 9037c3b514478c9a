// A weight matrix in the form that the kernels for 8-bit numbers multiply.
#pragma once

#include <vector>

#include "int8.hpp"
#include "packed.hpp"

namespace sparse_cpu {

// The groups of one matrix [rows][columns] that hold a weight, in blocks of kRowsOfBlock rows and kInputsOfChunk inputs, row
// blocks outermost, and its scales and bias. Row blocks are those of BlockedMatrix.
class Int8Matrix {
 public:
  Int8Matrix() = default;

  // `bias` has one number for each row; `scale` multiplies the rows' scales and the bias.
  Int8Matrix(const GroupRows& groups, const std::vector<float>& bias, const Int8Kernels& kernels, float scale = 1.0f);

  uint32_t rows() const { return rows_; }
  uint32_t columns() const { return columns_; }
  uint32_t row_blocks() const { return (rows_ + kRowsOfBlock - 1) / kRowsOfBlock; }
  uint32_t depth_blocks() const { return uint32_t(chunks_of(columns_)); }

  // The first block of row block `row`; chunk d is d further.
  size_t block(uint32_t row) const { return size_t(row) * depth_blocks(); }
  uint32_t first_row(uint32_t row_block) const { return row_block >= row_blocks() ? rows_ : row_block * kRowsOfBlock; }

  Int8View view() const;

  // As those of BlockedMatrix.
  size_t bytes() const;
  uint8_t* move_to(uint8_t* place);

 private:
  void add_block(const GroupRows& groups, uint32_t row, uint32_t depth, std::vector<uint32_t>& cursor);

  uint32_t rows_ = 0, columns_ = 0;
  int words_ = 1;
  std::vector<Int8Block> blocks_;
  std::vector<uint32_t> steps_;
  std::vector<uint16_t> order_, group_;  // group_ and weights_ are empty after a move
  std::vector<int32_t> weights_, sum_;
  std::vector<float> scale_, bias_;
  const uint16_t* moved_group_ = nullptr;
  const int32_t* moved_weights_ = nullptr;
};

}  // namespace sparse_cpu
