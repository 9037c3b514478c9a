// A weight matrix in the form that the kernels multiply.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "packed.hpp"

namespace sparse_cpu {

// The positions of the nonzeros of one matrix [rows][columns], in blocks of `block_rows` x `block_depth`, row blocks
// outermost. See Block in kernels.hpp for the order of the entries in a block.
class BlockedPattern {
 public:
  BlockedPattern() = default;

  // Only the positions of `weights` are read. `dense`: every weight is an entry, zeros too.
  BlockedPattern(const SparseRows& weights, bool dense, uint32_t block_rows = kRowsOfBlock,
                 uint32_t block_depth = kDepthOfBlock);

  uint32_t rows() const { return rows_; }
  uint32_t columns() const { return columns_; }
  uint32_t row_blocks() const { return row_blocks_; }
  uint32_t depth_blocks() const { return depth_blocks_; }
  bool dense() const { return dense_; }
  size_t entries() const { return entries_; }
  const std::vector<uint8_t>& index() const { return index_; }

  // The block at row block `row` and depth block `depth`.
  size_t block(uint32_t row, uint32_t depth = 0) const { return size_t(row) * depth_blocks_ + depth; }
  const Block& at(size_t block) const { return blocks_[block]; }

  // The rows [first_row(b), first_row(b + 1)) are those of row block b.
  uint32_t first_row(uint32_t row_block) const { return row_block >= row_blocks_ ? rows_ : row_block * block_rows_; }

  // Calls `visit(order, first_entry, steps)` for every bundle of a block: entry first_entry + s * kBundle + r is the s-th
  // nonzero of row order[r].
  template <class Visit>
  void each_bundle(const Block& block, Visit visit) const {
    const uint16_t* order = order_.data() + block.first_slot;
    size_t entry = block.first_entry;
    for (uint32_t r = 0; r < block.runs; r++) {
      const Run& run = runs_[block.first_run + r];
      for (uint32_t bundle = 0; bundle < run.bundles; bundle++, order += kBundle, entry += size_t(run.steps) * kBundle)
        visit(order, entry, run.steps);
    }
  }

  MatrixView view(const uint8_t* index, const float* value, const float* bias) const {
    return {blocks_.data(), runs_.data(), order_.data(), dense_ ? nullptr : index, value, bias};
  }

  // For each entry: 1 + the index of its nonzero in `weights`, or 0 for padding. Only needed once: drop it after use.
  std::vector<uint32_t> source;

  void drop_index() { std::vector<uint8_t>().swap(index_); }

 private:
  void add_block(const SparseRows& weights, uint32_t row, uint32_t depth, std::vector<uint32_t>& cursor);

  uint32_t rows_ = 0, columns_ = 0, block_rows_ = 0, block_depth_ = 0, row_blocks_ = 0, depth_blocks_ = 0;
  size_t entries_ = 0;
  bool dense_ = false;
  std::vector<Block> blocks_;
  std::vector<Run> runs_;
  std::vector<uint16_t> order_;
  std::vector<uint8_t> index_;
};

// The weights of one matrix in such blocks, and its bias.
class BlockedMatrix {
 public:
  BlockedMatrix() = default;

  // `bias` has one number for each row; `scale` multiplies weights and bias. Above a density of `dense_above` every weight
  // is stored, zeros too, for the kernel that reads no indexes.
  BlockedMatrix(const SparseRows& weights, const std::vector<float>& bias, double dense_above, float scale = 1.0f);

  uint32_t rows() const { return pattern_.rows(); }
  uint32_t columns() const { return pattern_.columns(); }
  uint32_t row_blocks() const { return pattern_.row_blocks(); }
  uint32_t depth_blocks() const { return pattern_.depth_blocks(); }
  bool dense() const { return pattern_.dense(); }
  size_t nonzeros() const { return nonzeros_; }

  MatrixView view() const;

  // `bytes`: what the kernels read for a product. `move_to`: move it to aligned memory that outlives the matrix, so that the
  // matrices of a model lie side by side on huge pages; returns the end.
  size_t bytes() const;
  uint8_t* move_to(uint8_t* place);

  // The first block of row block `row`; depth block d is d further.
  size_t block(uint32_t row) const { return pattern_.block(row); }
  uint32_t first_row(uint32_t row_block) const { return pattern_.first_row(row_block); }

 private:
  BlockedPattern pattern_;
  size_t nonzeros_ = 0;
  std::vector<float> value_, bias_;  // value_ is empty after a move, and so is the pattern's index
  uint8_t* moved_index_ = nullptr;
  float* moved_value_ = nullptr;
};

}  // namespace sparse_cpu
