#include "blocked.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace sparse_cpu {
namespace {

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

BlockedPattern::BlockedPattern(const SparseRows& weights, bool dense, uint32_t block_rows, uint32_t block_depth)
    : rows_(weights.rows),
      columns_(weights.columns),
      block_rows_(block_rows),
      block_depth_(block_depth),
      row_blocks_((weights.rows + block_rows - 1) / block_rows),
      depth_blocks_((weights.columns + block_depth - 1) / block_depth),
      dense_(dense) {
  std::vector<uint32_t> cursor(weights.start.begin(), weights.start.end() - 1);  // next nonzero of each row
  for (uint32_t row = 0; row < rows_; row += block_rows)
    for (uint32_t depth = 0; depth < columns_; depth += block_depth) add_block(weights, row, depth, cursor);
  entries_ = source.size();
  order_.resize(order_.size() + kBundle, 0);  // kernels look ahead
}

void BlockedPattern::add_block(const SparseRows& weights, uint32_t row, uint32_t depth, std::vector<uint32_t>& cursor) {
  const uint32_t count = std::min(block_rows_, rows_ - row), depths = std::min(block_depth_, columns_ - depth);
  Block block{row, count, depth, depths, uint32_t(runs_.size()), 0, order_.size(), source.size()};

  std::vector<uint32_t> begin(count), size(count);
  for (uint32_t r = 0; r < count; r++) {
    uint32_t& at = cursor[row + r];
    begin[r] = at;
    while (at < weights.start[row + r + 1] && weights.column[at] < depth + depths) at++;
    size[r] = at - begin[r];
  }
  std::vector<uint16_t> order(count);
  std::iota(order.begin(), order.end(), uint16_t(0));
  std::stable_sort(order.begin(), order.end(), [&](uint16_t a, uint16_t b) { return size[a] > size[b]; });
  // The last bundle is padded in front with copies of its last row and zero weights: what they store is overwritten when
  // the row itself is stored.
  const uint32_t missing = (kBundle - count % kBundle) % kBundle;
  order.insert(order.end() - (kBundle - missing) % kBundle, missing, order.back());

  for (size_t slot = 0; slot < order.size(); slot += kBundle) {
    const bool last = slot + kBundle == order.size();
    uint32_t steps = depths;
    if (!dense_) {
      steps = 0;
      for (int r = 0; r < kBundle; r++) steps = std::max(steps, size[order[slot + r]]);
    }
    if (block.runs == 0 || runs_.back().steps != steps) {
      runs_.push_back({steps, 0});
      block.runs++;
    }
    runs_.back().bundles++;

    const size_t first = source.size();
    source.resize(first + size_t(steps) * kBundle, 0);
    if (!dense_) index_.resize(source.size(), 0);
    for (uint32_t r = last ? missing : 0; r < kBundle; r++) {
      const uint32_t from = begin[order[slot + r]];
      for (uint32_t i = 0; i < size[order[slot + r]]; i++) {
        const uint32_t input = weights.column[from + i] - depth;
        const size_t entry = first + size_t(dense_ ? input : i) * kBundle + r;
        source[entry] = from + i + 1;
        if (!dense_) index_[entry] = uint8_t(input);
      }
    }
  }
  order_.insert(order_.end(), order.begin(), order.end());
  blocks_.push_back(block);
}

BlockedMatrix::BlockedMatrix(const SparseRows& weights, const std::vector<float>& bias, double dense_above, float scale)
    : pattern_(weights, weights.density() > dense_above), nonzeros_(weights.value.size()) {
  value_.resize(pattern_.entries() + kSpareValues, 0.0f);
  for (size_t entry = 0; entry < pattern_.entries(); entry++)
    if (const uint32_t source = pattern_.source[entry]) value_[entry] = weights.value[source - 1] * scale;
  std::vector<uint32_t>().swap(pattern_.source);
  bias_.resize(rows());
  std::transform(bias.begin(), bias.end(), bias_.begin(), [&](float b) { return b * scale; });
}

size_t BlockedMatrix::bytes() const { return aligned(value_.size() * sizeof(float)) + aligned(pattern_.index().size()); }

uint8_t* BlockedMatrix::move_to(uint8_t* place) {
  uint8_t* const end = place + bytes();
  moved_value_ = reinterpret_cast<float*>(place);
  std::memcpy(place, value_.data(), value_.size() * sizeof(float));
  moved_index_ = place + aligned(value_.size() * sizeof(float));
  if (!pattern_.index().empty()) std::memcpy(moved_index_, pattern_.index().data(), pattern_.index().size());
  std::vector<float>().swap(value_);
  pattern_.drop_index();
  return end;
}

MatrixView BlockedMatrix::view() const {
  return pattern_.view(moved_index_ ? moved_index_ : pattern_.index().data(), moved_value_ ? moved_value_ : value_.data(),
                       bias_.data());
}

}  // namespace sparse_cpu
