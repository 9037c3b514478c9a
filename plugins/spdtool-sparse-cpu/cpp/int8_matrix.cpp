#include "int8_matrix.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace sparse_cpu {
namespace {

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Writes the weights of a group as the kernels read them: bytes of one word, or halves of two.
void write_group(const int8_t* value, int words, int32_t* out) {
  if (words == 1) {
    std::memcpy(out, value, kInputsOfGroup);
    return;
  }
  for (int word = 0; word < 2; word++)
    out[word] = int32_t(uint32_t(uint16_t(value[2 * word])) | uint32_t(uint16_t(value[2 * word + 1])) << 16);
}

}  // namespace

Int8Matrix::Int8Matrix(const GroupRows& groups, const std::vector<float>& bias, const Int8Kernels& kernels, float scale)
    : rows_(groups.rows), columns_(groups.columns), words_(kernels.words), scale_(groups.scale), bias_(bias) {
  std::vector<uint32_t> cursor(groups.start.begin(), groups.start.end() - 1);  // next group of each row
  for (uint32_t row = 0; row < rows_; row += kRowsOfBlock)
    for (uint32_t depth = 0; depth < columns_; depth += kInputsOfChunk) add_block(groups, row, depth, cursor);
  group_.resize(group_.size() + kSpareSteps * kBundle, 0);
  for (std::vector<float>* numbers : {&scale_, &bias_})
    for (float& number : *numbers) number *= scale;
}

void Int8Matrix::add_block(const GroupRows& groups, uint32_t row, uint32_t depth, std::vector<uint32_t>& cursor) {
  const uint32_t count = std::min(kRowsOfBlock, rows_ - row), first_group = depth / kInputsOfGroup;
  const uint32_t end_group = std::min(depth + kInputsOfChunk, columns_) / kInputsOfGroup;
  std::vector<uint32_t> begin(count), size(count);
  for (uint32_t r = 0; r < count; r++) {
    uint32_t& at = cursor[row + r];
    begin[r] = at;
    while (at < groups.start[row + r + 1] && groups.group[at] < end_group) at++;
    size[r] = at - begin[r];
  }
  std::vector<uint16_t> order(count);
  std::iota(order.begin(), order.end(), uint16_t(0));
  std::stable_sort(order.begin(), order.end(), [&](uint16_t a, uint16_t b) { return size[a] > size[b]; });
  // The last bundle is padded in front, as in BlockedPattern::add_block.
  const uint32_t missing = (kBundle - count % kBundle) % kBundle;
  order.insert(order.end() - (kBundle - missing) % kBundle, missing, order.back());

  Int8Block block{row, depth, uint32_t(steps_.size()), uint32_t(order.size() / kBundle), group_.size()};
  for (size_t slot = 0; slot < order.size(); slot += kBundle) {
    uint32_t steps = 0;
    for (int r = 0; r < kBundle; r++) steps = std::max(steps, size[order[slot + r]]);
    steps_.push_back(steps);
    const size_t first = group_.size();
    group_.resize(first + size_t(steps) * kBundle, 0);
    weights_.resize(group_.size() * size_t(words_), 0);
    for (uint32_t r = 0; r < kBundle; r++) {
      const bool padding = slot + kBundle == order.size() && r < missing;
      const uint32_t from = begin[order[slot + r]];
      int32_t sum = 0;
      for (uint32_t i = 0; i < (padding ? 0 : size[order[slot + r]]); i++) {
        const int8_t* value = groups.value.data() + size_t(from + i) * kInputsOfGroup;
        const size_t entry = first + size_t(i) * kBundle + r;
        group_[entry] = uint16_t(groups.group[from + i] - first_group);
        write_group(value, words_, weights_.data() + entry * size_t(words_));
        sum += value[0] + value[1] + value[2] + value[3];
      }
      sum_.push_back(sum);
    }
  }
  order_.insert(order_.end(), order.begin(), order.end());
  blocks_.push_back(block);
}

size_t Int8Matrix::bytes() const {
  return aligned(weights_.size() * sizeof(int32_t)) + aligned(group_.size() * sizeof(uint16_t));
}

uint8_t* Int8Matrix::move_to(uint8_t* place) {
  uint8_t* const end = place + bytes();
  uint8_t* const groups = place + aligned(weights_.size() * sizeof(int32_t));
  if (!weights_.empty()) std::memcpy(place, weights_.data(), weights_.size() * sizeof(int32_t));
  std::memcpy(groups, group_.data(), group_.size() * sizeof(uint16_t));
  moved_weights_ = reinterpret_cast<const int32_t*>(place);
  moved_group_ = reinterpret_cast<const uint16_t*>(groups);
  std::vector<int32_t>().swap(weights_);
  std::vector<uint16_t>().swap(group_);
  return end;
}

Int8View Int8Matrix::view() const {
  return {blocks_.data(), steps_.data(), moved_group_ ? moved_group_ : group_.data(),
          moved_weights_ ? moved_weights_ : weights_.data(), order_.data(), sum_.data(), scale_.data(), bias_.data()};
}

}  // namespace sparse_cpu
