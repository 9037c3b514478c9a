// Reading the packed form: what is valid is read exactly, what is damaged is refused.
#include "packed.hpp"

#include <limits>
#include <memory>

#include "kernels.hpp"
#include "plain.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace sparse_cpu;
using namespace plain;
using check::Chance;

namespace {

constexpr Values kTypes[] = {Values::kFloat32, Values::kFloat16, Values::kInt8};

// A copy that ends where its memory ends, so that the address sanitizer sees each byte read beyond.
struct Exact {
  explicit Exact(const Bytes& bytes) : data(new uint8_t[bytes.size()]), size(bytes.size()) {
    std::copy(bytes.begin(), bytes.end(), data.get());
  }
  Packed open() const { return sparse_cpu::open(data.get(), size, "layer.weight"); }
  SparseRows rows() const { return read_rows(open()); }
  std::vector<float> vector(size_t n) const { return read_vector(open(), n); }
  void table(uint32_t columns) const { check_table(open(), columns); }

  std::unique_ptr<uint8_t[]> data;
  size_t size;
};

std::vector<float> dense(const SparseRows& sparse) {
  std::vector<float> numbers(size_t(sparse.rows) * sparse.columns, 0.0f);
  CHECK(sparse.start.size() == sparse.rows + 1 && sparse.start.front() == 0 && sparse.start.back() == sparse.value.size());
  CHECK(sparse.column.size() == sparse.value.size());
  for (uint32_t r = 0; r < sparse.rows; r++)
    for (uint32_t i = sparse.start[r]; i < sparse.start[r + 1]; i++) {
      CHECK(i == sparse.start[r] || sparse.column[i] > sparse.column[i - 1]);
      CHECK(sparse.value[i] != 0.0f);
      numbers[size_t(r) * sparse.columns + sparse.column[i]] = sparse.value[i];
    }
  return numbers;
}

void checksum() {
  const std::string digits = "123456789";
  CHECK(crc32(reinterpret_cast<const uint8_t*>(digits.data()), 9) == 0xCBF43926u);
  Chance chance(1);
  for (size_t size = 0; size < 70; size++) {
    Bytes bytes(size);
    for (uint8_t& b : bytes) b = uint8_t(chance.bits());
    const size_t cut = size ? chance.below(size) : 0;
    CHECK(crc32(bytes.data(), size) == slow_crc(bytes.data(), size));
    CHECK(crc32(bytes.data() + cut, size - cut, crc32(bytes.data(), cut)) == slow_crc(bytes.data(), size));
  }
}

void every_half() {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const float found = half_to_float(uint16_t(bits));
    if (exponent == 31 && fraction) {
      CHECK(std::isnan(found));
      continue;
    }
    const double size = exponent == 31 ? INFINITY
                        : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                       : std::ldexp(fraction, -24);
    const float expected = float(bits & 0x8000 ? -size : size);
    CHECK(std::memcmp(&found, &expected, 4) == 0);
    CHECK(exponent == 31 || half_bits(expected) == bits);
  }
}

// A session may set its threads to take subnormal numbers for zero; subnormal float16 are ordinary float32.
void every_half_with_subnormals_off() {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  std::vector<float> found;
  for (uint32_t bits = 0; bits < 0x7c00; bits++) found.push_back(half_to_float(uint16_t(bits)));
  _mm_setcsr(before);
  for (uint32_t bits = 0; bits < 0x7c00; bits++) CHECK(found[bits] == half_to_float(uint16_t(bits)));
#endif
}

void reads_what_was_packed() {
  Chance chance(2);
  const std::pair<uint32_t, uint32_t> shapes[] = {{1, 1}, {1, 300}, {300, 1}, {7, 13}, {3, 1000}, {2, 65536}, {64, 65}};
  for (const Values type : kTypes)
    for (const auto& [rows, columns] : shapes)
      for (const double density : {0.0, 0.01, 0.1, 0.5, 1.0})
        for (int bits = 0; bits <= 8; bits++) {
          if (columns == 65536 && (bits % 4 || density == 0.5)) continue;  // long for what it shows
          const Matrix m = random_matrix(chance, rows, columns, type, density);
          const Exact packed(pack(m, bits));
          CHECK(dense(packed.rows()) == m.all());
          if (bits == 0) packed.table(columns);
          if (bits == 0 && rows == 1) CHECK(packed.vector(columns) == m.all());
        }
}

// Gaps around every multiple of the largest value of a field.
void every_gap() {
  for (int bits = 1; bits <= 8; bits++)
    for (uint32_t gap = 0; gap < 3u << bits; gap++) {
      Matrix m{1, 2 * gap + 3, Values::kFloat32, std::vector<float>(2 * gap + 3, 0.0f), {}};
      m.raw[gap] = 1.0f;
      m.raw[2 * gap + 1] = 2.0f;
      CHECK(dense(Exact(pack(m, bits)).rows()) == m.raw);
    }
}

void extreme_values() {
  using limits = std::numeric_limits<float>;
  Matrix m{1, 6, Values::kFloat32, {limits::max(), -limits::max(), limits::min(), limits::denorm_min(), -1.0f, 1.0f}, {}};
  CHECK(dense(Exact(pack(m, 1)).rows()) == m.raw);
  m = {1, 4, Values::kFloat16, {65504.0f, -65504.0f, 0x1p-24f, 0x1p-14f}, {}};
  CHECK(dense(Exact(pack(m, 1)).rows()) == m.raw);
  CHECK(dense(Exact(pack(m, 0)).rows()) == m.raw);
}

// Every number of 6 bits, in every quarter of a row.
void six_bits() {
  Chance chance(6);
  for (const auto& [rows, columns] : {std::pair<uint32_t, uint32_t>{1, 4}, {5, 12}, {300, 36}, {2, 1024}}) {
    Matrix m = random_matrix(chance, rows, columns, Values::kInt6, 0.9);
    for (size_t i = 0; i < m.raw.size() && columns == 1024; i++) m.raw[i] = float(int(i % 64) - 32);
    const Exact packed(pack(m, 0));
    CHECK(packed.size == 64 + rows * (4 + columns * 3 / 4));
    packed.table(columns);
    CHECK(dense(packed.rows()) == m.all());
    if (rows == 1) CHECK(packed.vector(columns) == m.all());
  }
}

// ---- damage

Bytes valid(Values type, int bits) {
  Chance chance(3);
  return pack(random_matrix(chance, 5, 40, type, 0.3), bits);
}

void each_flipped_bit() {
  for (const Values type : kTypes)
    for (const int bits : {0, 3}) {
      const Bytes good = valid(type, bits);
      for (size_t i = 0; i < good.size() * 8; i++) {
        Bytes bad = good;
        bad[i / 8] ^= uint8_t(1 << (i % 8));
        CHECK_REFUSED(PackedError, Exact(bad).open(), "layer.weight");
      }
    }
}

void each_length() {
  for (const int bits : {0, 3}) {
    const Bytes good = valid(Values::kInt8, bits);
    for (size_t size = 0; size < good.size(); size++) {
      Bytes bad(good.begin(), good.begin() + long(size));
      CHECK_REFUSED(PackedError, Exact(bad).open(), "layer.weight");
      CHECK_REFUSED(PackedError, Exact(seal(bad)).open(), "layer.weight");
    }
    Bytes longer = good;
    longer.push_back(0);
    CHECK_REFUSED(PackedError, Exact(seal(longer)).open(), "not what its header asks for");
  }
}

template <class T>
Bytes with(Bytes bytes, size_t at, T value) {
  put(bytes, at, value);
  return seal(bytes);
}

void damaged_header() {
  const Bytes sparse = valid(Values::kFloat32, 3), full = valid(Values::kFloat32, 0);
  const auto refused = [](const Bytes& bytes, const char* why) { CHECK_REFUSED(PackedError, Exact(bytes).open(), why); };
  refused(with(sparse, 0, 'X'), "does not begin with SPDM");
  refused(with<uint8_t>(sparse, 4, 2), "packed in format 2; this library reads format 1");
  refused(with<uint8_t>(sparse, 5, 4), "unknown type of values 4");
  refused(with<uint8_t>(sparse, 5, 3), "gaps between values of 6 bits");
  refused(with<uint8_t>(full, 5, 3), "not what its header asks for");
  Chance chance(7);
  const Bytes six = pack(random_matrix(chance, 3, 8, Values::kInt6, 0.9), 0);
  refused(with<uint8_t>(six, 7, 2), "blocks of 2^2 inputs");
  refused(with<uint32_t>(with<uint32_t>(six, 8, 4), 12, 6), "6 columns of 6 bits");
  refused(with<uint8_t>(sparse, 6, 9), "gaps of 9 bits");
  refused(with<uint8_t>(sparse, 6, 255), "gaps of 255 bits");
  refused(with<uint8_t>(sparse, 7, 1), "blocks of 2^1 inputs");
  refused(with<uint8_t>(sparse, 7, 2), "blocks of 2^2 inputs");  // of float32
  for (size_t at = 36; at < 64; at++) refused(with<uint8_t>(sparse, at, 0x80), "reserved");
  refused(with<uint32_t>(sparse, 8, 0), "0 weights");
  refused(with<uint32_t>(sparse, 12, 0), "0 weights");
  refused(with<uint32_t>(with<uint32_t>(sparse, 8, 1u << 15), 12, (1u << 15) + 1), "weights");
  refused(with<uint32_t>(with<uint32_t>(sparse, 8, ~0u), 12, ~0u), "weights");
  for (const uint64_t stored : {uint64_t(0), uint64_t(1), uint64_t(199), uint64_t(1) << 62, ~uint64_t(0), uint64_t(1) << 63})
    refused(with(sparse, 16, stored), "");
  refused(with<uint64_t>(full, 16, 199), "199 values stored of 200 weights");
  refused(with<uint64_t>(full, 24, 1), "positions where every value is stored");
  for (const uint64_t size : {uint64_t(0), uint64_t(1) << 61, ~uint64_t(0), ~uint64_t(0) - 63, uint64_t(1) << 63})
    refused(with(sparse, 24, size), "");
  // The same number of bytes with other counts: one float32 fewer, four bytes of positions more.
  Bytes told = sparse;
  uint64_t stored, positions;
  std::memcpy(&stored, &told[16], 8);
  std::memcpy(&positions, &told[24], 8);
  told = with(with(told, 16, stored - 1), 24, positions + 4);
  CHECK_REFUSED(PackedError, Exact(told).rows(), "damaged");
  told = with(with(sparse, 16, stored + 1), 24, positions - 4);
  CHECK_REFUSED(PackedError, Exact(told).rows(), "damaged");
  // No value, yet positions.
  Matrix nothing{2, 8, Values::kFloat32, std::vector<float>(16, 0.0f), {}};
  Bytes extra = pack(nothing, 2);
  extra.push_back(0);
  refused(with<uint64_t>(extra, 24, 1), "positions");
}

void positions_that_leave_the_matrix() {
  for (int bits = 1; bits <= 8; bits++) {
    Matrix m{1, 9, Values::kFloat32, std::vector<float>(9, 0.0f), {}};
    m.raw[8] = 1.0f;
    const Bytes good = pack(m, bits);
    CHECK(dense(Exact(good).rows()) == m.raw);
    CHECK_REFUSED(PackedError, Exact(with<uint32_t>(good, 12, 8)).rows(), "a position outside the matrix");
    CHECK_REFUSED(PackedError, Exact(with<uint32_t>(good, 12, 1)).rows(), "a position outside the matrix");
    CHECK(dense(Exact(with<uint32_t>(with<uint32_t>(good, 8, 9), 12, 1)).rows()) == m.raw);
  }
  // Values side by side, one more than there are places.
  Matrix full{1, 4, Values::kFloat32, {1, 2, 3, 4}, {}};
  CHECK_REFUSED(PackedError, Exact(with<uint32_t>(pack(full, 2), 12, 3)).rows(), "");
}

void positions_that_end_or_go_on() {
  Matrix m{1, 64, Values::kFloat32, std::vector<float>(64, 0.0f), {}};
  m.raw[0] = m.raw[50] = 1.0f;
  const Bytes good = pack(m, 3);  // 1 + 8 fields: 27 bits, 4 bytes
  Bytes cut(good.begin(), good.end() - 1);
  CHECK_REFUSED(PackedError, Exact(with<uint64_t>(cut, 24, 3)).rows(), "positions end too early");
  Bytes longer = good;
  longer.push_back(0);
  CHECK_REFUSED(PackedError, Exact(with<uint64_t>(longer, 24, 5)).rows(), "more positions than values");
  for (int bit = 3; bit < 8; bit++)
    CHECK_REFUSED(PackedError, Exact(with<uint8_t>(good, good.size() - 1, uint8_t(good.back() | 1 << bit))).rows(),
                  "more positions than values");
}

void values_that_cannot_be() {
  const float none = std::numeric_limits<float>::quiet_NaN();
  for (const float bad : {none, float(INFINITY), float(-INFINITY)})
    for (const int bits : {0, 1}) {
      Matrix m{1, 4, Values::kFloat32, {1, 2, bad, 4}, {}};
      const Bytes bytes = pack(m, bits);
      CHECK_REFUSED(PackedError, Exact(bytes).rows(), "not finite");
      if (bits == 0) CHECK_REFUSED(PackedError, Exact(bytes).vector(4), "not finite");
      if (bits == 0) CHECK_REFUSED(PackedError, Exact(bytes).table(4), "not finite");
    }
  for (const uint16_t bad : {uint16_t(0x7c00), uint16_t(0xfc00), uint16_t(0x7e00), uint16_t(0xffff)}) {
    const Bytes bytes = with(pack({1, 4, Values::kFloat16, {1, 2, 3, 4}, {}}, 0), 64 + 4, bad);
    CHECK_REFUSED(PackedError, Exact(bytes).rows(), "not finite");
    CHECK_REFUSED(PackedError, Exact(bytes).table(4), "not finite");
  }
  // Where zeros are skipped, none is stored; of either sign.
  const Bytes floats = pack({1, 4, Values::kFloat32, {1, 2, 3, 4}, {}}, 1);
  CHECK_REFUSED(PackedError, Exact(with(floats, 64, 0.0f)).rows(), "a stored value is zero");
  CHECK_REFUSED(PackedError, Exact(with(floats, 64, -0.0f)).rows(), "a stored value is zero");
  const Bytes halves = pack({1, 4, Values::kFloat16, {1, 2, 3, 4}, {}}, 1);
  CHECK_REFUSED(PackedError, Exact(with<uint16_t>(halves, 66, 0x8000)).rows(), "a stored value is zero");
  const Bytes bytes = pack({1, 4, Values::kInt8, {1, 2, 3, 4}, {0.5f}}, 1);
  CHECK_REFUSED(PackedError, Exact(with<uint8_t>(bytes, 68, 0)).rows(), "a stored value is zero");
}

void scales_that_cannot_be() {
  for (const float bad : {0.0f, -0.0f, -1.0f, std::numeric_limits<float>::quiet_NaN(), float(INFINITY)})
    for (const int bits : {0, 2})
      for (const float value : {3.0f, 0.0f}) {  // also the scale of a row of zeros
        const Matrix m{2, 3, Values::kInt8, {1, 2, 3, value, value, value}, {1.0f, bad}};
        CHECK_REFUSED(PackedError, Exact(pack(m, bits)).rows(), "scale");
        if (bits == 0) CHECK_REFUSED(PackedError, Exact(pack(m, bits)).table(3), "scale");
        const Matrix six{2, 4, Values::kInt6, {1, 2, 3, 4, value, value, value, value}, {1.0f, bad}};
        CHECK_REFUSED(PackedError, Exact(pack(six, 0)).table(4), "scale");
      }
  const Matrix huge{1, 2, Values::kInt8, {1, 127}, {1e38f}};
  CHECK_REFUSED(PackedError, Exact(pack(huge, 0)).rows(), "not finite");
  CHECK_REFUSED(PackedError, Exact(pack(huge, 0)).table(2), "not finite");
  const Matrix huge_six{1, 4, Values::kInt6, {1, 2, 3, 31}, {1e38f}};
  CHECK_REFUSED(PackedError, Exact(pack(huge_six, 0)).table(4), "not finite");
}

void shapes_that_do_not_fit() {
  Chance chance(4);
  const Exact full(pack(random_matrix(chance, 2, 3, Values::kFloat32, 1.0), 0));
  const Exact sparse(pack(random_matrix(chance, 1, 3, Values::kFloat32, 1.0), 1));
  CHECK_REFUSED(PackedError, full.vector(6), "2 x 3 where a vector of 6 is needed");
  CHECK_REFUSED(PackedError, full.vector(3), "is needed");
  CHECK_REFUSED(PackedError, sparse.vector(3), "is needed");
  CHECK_REFUSED(PackedError, sparse.table(3), "stored sparse");
  CHECK_REFUSED(PackedError, full.table(4), "3 columns where a table of 4 columns is needed");
  const Matrix wide{1, 65537, Values::kFloat32, std::vector<float>(65537, 0.0f), {}};
  CHECK_REFUSED(PackedError, Exact(pack(wide, 8)).rows(), "more than 65,536 columns");
}

}  // namespace

int main(int count, char** arguments) {
  return check::run({{"checksum", checksum},
                     {"every half", every_half},
                     {"every half, subnormals off", every_half_with_subnormals_off},
                     {"reads what was packed", reads_what_was_packed},
                     {"every gap", every_gap},
                     {"extreme values", extreme_values},
                     {"six bits", six_bits},
                     {"each flipped bit", each_flipped_bit},
                     {"each length", each_length},
                     {"damaged header", damaged_header},
                     {"positions that leave the matrix", positions_that_leave_the_matrix},
                     {"positions that end or go on", positions_that_end_or_go_on},
                     {"values that cannot be", values_that_cannot_be},
                     {"scales that cannot be", scales_that_cannot_be},
                     {"shapes that do not fit", shapes_that_do_not_fit}},
                    count, arguments);
}
