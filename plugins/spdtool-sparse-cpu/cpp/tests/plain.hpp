// Slow and plain: matrices as they are, how one is packed, and threads to lend.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>

#include "check.hpp"
#include "packed.hpp"
#include "team.hpp"

namespace plain {

using sparse_cpu::Lender;
using sparse_cpu::Values;
using Bytes = std::vector<uint8_t>;

// The bits of a float16 that is exactly `x`.
inline uint16_t half_bits(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs(double(x));
  if (size < 0x1p-14) return uint16_t(sign | uint16_t(size * 0x1p24));
  int exponent;
  const double fraction = std::frexp(size, &exponent);  // in [1/2, 1)
  return uint16_t(sign | (exponent + 14) << 10 | uint16_t((fraction * 2 - 1) * 1024));
}

// A matrix whose numbers its type of values holds exactly.
struct Matrix {
  uint32_t rows = 0, columns = 0;
  Values type = Values::kFloat32;
  std::vector<float> raw;     // what is stored, before the scale
  std::vector<float> scales;  // of int8 and int6, one a row

  float at(size_t row, size_t column) const {
    const float stored = raw[row * columns + column];
    return scales.empty() ? stored : stored * scales[row];
  }
  std::vector<float> all() const {
    std::vector<float> numbers;
    for (size_t r = 0; r < rows; r++)
      for (size_t c = 0; c < columns; c++) numbers.push_back(at(r, c));
    return numbers;
  }
};

// About `density` of the weights are not zero, and of the size `spread`.
inline Matrix random_matrix(check::Chance& chance, uint32_t rows, uint32_t columns, Values type, double density,
                            float spread = 1.0f) {
  Matrix m{rows, columns, type, {}, {}};
  if (type == Values::kFloat16) spread = std::exp2(std::floor(std::log2(spread)));  // so that float16 holds them exactly
  const bool whole_numbers = type == Values::kInt8 || type == Values::kInt6;
  const uint32_t limit = type == Values::kInt6 ? 31 : 127;
  for (uint32_t r = 0; whole_numbers && r < rows; r++)
    m.scales.push_back(spread * (0.5f + float(chance.uniform())) / float(limit));
  for (size_t i = 0; i < size_t(rows) * columns; i++) {
    float x = 0;
    if (chance.uniform() < density) {
      const float whole = float(chance.below(2 * limit)) - float(limit);
      const float size = whole < 0 ? whole : whole + 1;  // -127..-1, 1..127
      x = whole_numbers ? size : type == Values::kFloat16 ? size * spread / 128 : chance.number() * spread;
    }
    m.raw.push_back(x);
  }
  return m;
}

inline std::vector<float> random_vector(check::Chance& chance, size_t size, float middle = 0.0f, float spread = 1.0f) {
  std::vector<float> numbers(size);
  for (float& x : numbers) x = middle + spread * chance.number();
  return numbers;
}

// As `random_matrix` of int8, with zeros in blocks of four inputs; `columns` is a multiple of four.
inline Matrix random_blocks(check::Chance& chance, uint32_t rows, uint32_t columns, double density, float spread = 1.0f) {
  Matrix m = random_matrix(chance, rows, columns, Values::kInt8, 0.9, spread);
  for (size_t i = 0; i < m.raw.size(); i += 4)
    if (chance.uniform() >= density) std::fill_n(m.raw.begin() + long(i), 4, 0.0f);
  return m;
}

// ---- the packed form

inline uint32_t slow_crc(const uint8_t* bytes, size_t size) {
  uint32_t c = ~0u;
  for (size_t i = 0; i < size; i++) {
    c ^= bytes[i];
    for (int bit = 0; bit < 8; bit++) c = c & 1 ? (c >> 1) ^ 0xEDB88320u : c >> 1;
  }
  return ~c;
}

template <class T>
void put(Bytes& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}
template <class T>
void append(Bytes& bytes, T value) {
  bytes.resize(bytes.size() + sizeof value);
  put(bytes, bytes.size() - sizeof value, value);
}

// Writes the checksum that belongs to the rest.
inline Bytes& seal(Bytes& bytes) {
  if (bytes.size() < 64) return bytes;
  put<uint32_t>(bytes, 32, 0);
  put<uint32_t>(bytes, 32, slow_crc(bytes.data(), bytes.size()));
  return bytes;
}

// Bits, least significant first, in fields of `width`.
class Bits {
 public:
  void field(uint32_t value, int width) {
    for (int bit = 0; bit < width; bit++, count_++) {
      if (count_ % 8 == 0) bytes_.push_back(0);
      bytes_.back() = uint8_t(bytes_.back() | ((value >> bit) & 1) << (count_ % 8));
    }
  }
  const Bytes& bytes() const { return bytes_; }

 private:
  Bytes bytes_;
  size_t count_ = 0;
};

// `size`: weights of a block, 4 or 1.
inline Bytes pack(const Matrix& m, int gap_bits, size_t size = 1) {
  Bytes scales, values;
  Bits positions;
  uint64_t stored = 0;
  uint32_t gap = 0;
  const uint32_t most = (1u << gap_bits) - 1;
  for (const float scale : m.scales) append(scales, scale);
  for (size_t i = 0; i < m.raw.size(); i += size) {
    const auto begin = m.raw.begin() + long(i), end = begin + long(size);
    if (gap_bits && std::count(begin, end, 0.0f) == long(size)) {
      gap++;
      continue;
    }
    for (; gap_bits && gap >= most; gap -= most) positions.field(most, gap_bits);
    if (gap_bits) positions.field(gap, gap_bits);
    gap = 0;
    stored += size;
    for (auto x = begin; x < end; x++) {
      if (m.type == Values::kFloat32) append(values, *x);
      if (m.type == Values::kFloat16) append(values, half_bits(*x));
      if (m.type == Values::kInt8) append(values, int8_t(*x));
    }
  }
  for (size_t r = 0; m.type == Values::kInt6 && r < m.rows; r++) {
    const size_t quarter = m.columns / 4;
    const auto bits = [&](size_t column) { return unsigned(int(m.raw[r * m.columns + column])) & 63; };
    for (size_t plane = 0; plane < 3; plane++)
      for (size_t i = 0; i < quarter; i++)
        append(values, uint8_t(bits(plane * quarter + i) | (bits(3 * quarter + i) >> (2 * plane) & 3) << 6));
  }
  Bytes bytes(64, 0);
  std::memcpy(bytes.data(), "SPDM", 4);
  bytes[4] = 1;
  bytes[5] = uint8_t(m.type);
  bytes[6] = uint8_t(gap_bits);
  bytes[7] = size == 4 ? 2 : 0;
  put<uint32_t>(bytes, 8, m.rows);
  put<uint32_t>(bytes, 12, m.columns);
  put<uint64_t>(bytes, 16, stored);
  put<uint64_t>(bytes, 24, positions.bytes().size());
  for (const Bytes* part : {&std::as_const(scales), &std::as_const(values), &positions.bytes()})
    bytes.insert(bytes.end(), part->begin(), part->end());
  return seal(bytes);
}

inline Matrix vector_matrix(const std::vector<float>& numbers) {
  return {1, uint32_t(numbers.size()), Values::kFloat32, numbers, {}};
}

// ---- threads

// Lends `threads` new threads; each starts up to `late` microseconds after it is asked for. One makes the calls in turn.
struct Threads {
  size_t threads = 1;
  unsigned late = 0;

  operator Lender() { return {call, this}; }

  static void call(void* context, size_t count, void (*work)(void*, size_t), void* user) {
    const Threads& self = *static_cast<Threads*>(context);
    if (self.threads == 1) {
      for (size_t i = 0; i < count; i++) work(user, i);
      return;
    }
    std::vector<std::thread> running;
    std::atomic<size_t> next{0}, started{0};
    for (size_t t = 0; t < self.threads; t++)
      running.emplace_back([&, t] {
        // All at once, or one by one. The counters order nothing that the work does: they are relaxed.
        started.fetch_add(1, std::memory_order_relaxed);
        while (started.load(std::memory_order_relaxed) < self.threads) std::this_thread::yield();
        if (self.late) std::this_thread::sleep_for(std::chrono::microseconds(self.late * t));
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(user, i);
      });
    for (std::thread& thread : running) thread.join();
  }
};

}  // namespace plain
