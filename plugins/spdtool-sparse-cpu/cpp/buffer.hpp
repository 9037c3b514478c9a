// Aligned memory for weights and activations.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.hpp"

namespace sparse_cpu {

// An array of a plain type, zeroed when it is allocated, on huge pages where the system has them: the weights of a model
// are read from end to end for every batch.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size) { grow(size); }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  // Grows to at least `size` objects; the content is lost if the array has to move. Throws std::bad_alloc.
  T* grow(size_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = 0;
      const size_t unit = size * sizeof(T) >= kHugePage ? kHugePage : kAlignment;
      const size_t bytes = (size * sizeof(T) + unit - 1) / unit * unit;
      data_ = static_cast<T*>(std::aligned_alloc(unit, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
      if (unit == kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
      std::memset(static_cast<void*>(data_), 0, bytes);
      size_ = size;
    }
    return data_;
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  static constexpr size_t kHugePage = size_t(2) << 20;

  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace sparse_cpu
