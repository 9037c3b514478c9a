// The weights and bias of a linear layer, in the form that its file asks for.
#pragma once

#include <utility>

#include "blocked.hpp"
#include "int8_matrix.hpp"

namespace sparse_cpu {

// Both tables of functions of this machine.
struct Machine {
  const Kernels& floats;
  const Int8Kernels& integers;
};

inline Machine best_machine() { return {best_kernels(), best_int8_kernels()}; }

// A matrix of single weights, multiplied in float32; or one of int8 in blocks of four inputs, multiplied in 8 bits, for which
// the inputs are rounded first.
class LinearWeights {
 public:
  LinearWeights() = default;

  // `scale` multiplies weights and bias. Throws PackedError.
  LinearWeights(const Packed& packed, const std::vector<float>& bias, const Machine& machine, float scale = 1.0f)
      : rounds_(packed.block_bits != 0) {
    if (rounds_) {
      blocks_ = Int8Matrix(read_groups(packed), bias, machine.integers, scale);
    } else {
      single_ = BlockedMatrix(read_rows(packed), bias, machine.floats.dense_above, scale);
    }
  }

  explicit LinearWeights(BlockedMatrix matrix) : single_(std::move(matrix)) {}

  // The matrices of equal height that stand one above the other in `packed`; there is a scale for each. Throws PackedError.
  static std::vector<LinearWeights> split(const Packed& packed, const std::vector<float>& bias, const Machine& machine,
                                          const std::vector<float>& scales) {
    const uint32_t rows = packed.rows / uint32_t(scales.size());
    const GroupRows groups = packed.block_bits ? read_groups(packed) : GroupRows();
    const SparseRows singles = packed.block_bits ? SparseRows() : read_rows(packed);
    std::vector<LinearWeights> matrices(scales.size());
    for (uint32_t m = 0; m < scales.size(); m++) {
      const uint32_t first = m * rows;
      const std::vector<float> numbers(bias.begin() + first, bias.begin() + first + rows);
      LinearWeights& matrix = matrices[m];
      matrix.rounds_ = packed.block_bits != 0;
      if (matrix.rounds_) {
        matrix.blocks_ = Int8Matrix(rows_of(groups, first, rows), numbers, machine.integers, scales[m]);
      } else {
        matrix.single_ = BlockedMatrix(rows_of(singles, first, rows), numbers, machine.floats.dense_above, scales[m]);
      }
    }
    return matrices;
  }

  bool rounds() const { return rounds_; }  // its inputs
  const BlockedMatrix& single() const { return single_; }
  const Int8Matrix& blocks() const { return blocks_; }

  uint32_t rows() const { return rounds_ ? blocks_.rows() : single_.rows(); }
  uint32_t columns() const { return rounds_ ? blocks_.columns() : single_.columns(); }
  uint32_t row_blocks() const { return rounds_ ? blocks_.row_blocks() : single_.row_blocks(); }
  uint32_t first_row(uint32_t row_block) const {
    return rounds_ ? blocks_.first_row(row_block) : single_.first_row(row_block);
  }

  // As those of BlockedMatrix.
  size_t bytes() const { return rounds_ ? blocks_.bytes() : single_.bytes(); }
  uint8_t* move_to(uint8_t* place) { return rounds_ ? blocks_.move_to(place) : single_.move_to(place); }

 private:
  bool rounds_ = false;
  BlockedMatrix single_;
  Int8Matrix blocks_;
};

// Inputs of a layer in one tile, in the form that it reads; the other one may be missing.
struct LayerIn {
  const float* single;
  RoundedTile rounded;
};

// Row blocks [begin, end) of W x + bias, for one tile. Both tiles begin at row 0.
inline void multiply_tile(const LinearWeights& weights, uint32_t begin, uint32_t end, const LayerIn& x, TileOut y,
                          int vectors, const Machine& machine) {
  if (weights.rounds()) {
    const Int8Matrix& matrix = weights.blocks();
    machine.integers.multiply(matrix.view(), matrix.block(begin), matrix.block(end), x.rounded, 0, y, vectors);
  } else {
    const BlockedMatrix& matrix = weights.single();
    machine.floats.multiply(matrix.view(), matrix.block(begin), matrix.block(end), {x.single, 0}, y, vectors);
  }
}

}  // namespace sparse_cpu
