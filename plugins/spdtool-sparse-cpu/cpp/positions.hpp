// What depends on the positions of tokens: angles of rotary positions, and buckets of distances.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "packed.hpp"

namespace sparse_cpu {

// Cosines and sines of rotary positions, for as many positions as were asked for.
class RotaryTable {
 public:
  // `frequencies` has one number for each pair of rows of a head. Cosines of position p, then its sines, are at
  // data[p * 2 * frequencies.size()].
  const float* grow(size_t positions, const std::vector<float>& frequencies) {
    const size_t half = frequencies.size();
    for (size_t p = half == 0 ? positions : table_.size() / (2 * half); p < positions; p++) {
      table_.resize((p + 1) * 2 * half);
      float* const row = table_.data() + p * 2 * half;
      for (size_t f = 0; f < half; f++) {
        const float angle = float(p) * frequencies[f];  // rounded as torch does: at position 8,000 it shows
        row[f] = float(std::cos(double(angle)));
        row[half + f] = float(std::sin(double(angle)));
      }
    }
    return table_.data();
  }

 private:
  std::vector<float> table_;
};

// The bucket of each distance: a table for those up to a limit, whose ends stand for every further one.
class DistanceBuckets {
 public:
  DistanceBuckets() = default;

  // `numbers`: the buckets of the distances -n to n, each below `count` and none less than the one before if `ascends`.
  // Throws PackedError.
  DistanceBuckets(const std::vector<float>& numbers, size_t count, bool ascends) : limit_(int32_t(numbers.size() / 2)) {
    if (numbers.size() % 2 == 0) throw PackedError("buckets of distances: not as many before 0 as behind it");
    for (const float number : numbers) {
      if (!(number >= 0 && number < float(count)) || number != std::floor(number))
        throw PackedError("buckets of distances: " + std::to_string(number) + " is none of " + std::to_string(count));
      // Scores are computed for the buckets between those of the least and the largest distance.
      if (ascends && !buckets_.empty() && int32_t(number) < buckets_.back())
        throw PackedError("buckets of distances: they do not ascend");
      buckets_.push_back(int32_t(number));
    }
  }

  int32_t at(int64_t distance) const {
    return buckets_[size_t(std::clamp<int64_t>(distance, -limit_, limit_) + limit_)];
  }

 private:
  int32_t limit_ = 0;
  std::vector<int32_t> buckets_;
};

// Numbers of every distance up to a length, so that those of neighbouring distances lie side by side.
template <class T>
class ByDistance {
 public:
  // `of(series, distance)` is called where the numbers are not yet there.
  template <class Of>
  void grow(size_t length, size_t series, Of of) {
    if (length <= length_) return;
    length_ = length;
    stride_ = 2 * length + kSpare;
    numbers_.assign(series * stride_, T());
    for (size_t s = 0; s < series; s++)
      for (int64_t d = -int64_t(length); d <= int64_t(length); d++) numbers_[s * stride_ + size_t(d + int64_t(length))] = of(s, d);
  }

  const T* zero(size_t series) const { return numbers_.data() + series * stride_ + length_; }

 private:
  static constexpr size_t kSpare = 1 + 64;  // whole vectors are loaded

  size_t length_ = 0, stride_ = 0;
  std::vector<T> numbers_;
};

}  // namespace sparse_cpu
