#include "packed.hpp"

#include <array>
#include <cmath>
#include <cstring>
#include <limits>

namespace sparse_cpu {
namespace {

constexpr size_t kHeaderBytes = 64;
constexpr size_t kChecksumAt = 32;
constexpr size_t kUnusedFrom = 36;  // to the end of the header
constexpr int kBlockBits = 2;
constexpr uint8_t kVersion = 1;
constexpr uint64_t kMostWeights = uint64_t(1) << 30;

template <class T>
T at(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

[[noreturn]] void refuse(const std::string& name, const std::string& what) {
  throw PackedError(name + ": damaged packed matrix: " + what);
}

bool has_scales(Values type) { return type == Values::kInt8 || type == Values::kInt6; }

// Bytes of `stored` values; of int6 they are a multiple of four.
uint64_t bytes_of(Values type, uint64_t stored) {
  switch (type) {
    case Values::kFloat32: return 4 * stored;
    case Values::kFloat16: return 2 * stored;
    case Values::kInt8: return stored;
    default: return stored / 4 * 3;
  }
}

// Eight tables, so that the checksum of a model takes milliseconds: table[k][b] is byte b followed by k zero bytes.
std::array<std::array<uint32_t, 256>, 8> make_tables() {
  std::array<std::array<uint32_t, 256>, 8> table{};
  for (uint32_t b = 0; b < 256; b++) {
    uint32_t c = b;
    for (int bit = 0; bit < 8; bit++) c = c & 1 ? (c >> 1) ^ 0xEDB88320u : c >> 1;
    table[0][b] = c;
  }
  for (int k = 1; k < 8; k++)
    for (uint32_t b = 0; b < 256; b++) table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 255];
  return table;
}

// Reads fields of `bits` bits, least significant first.
class Fields {
 public:
  Fields(const uint8_t* bytes, uint64_t size, int bits) : bytes_(bytes), left_(size * 8), bits_(bits) {}

  bool next(uint32_t& field) {
    if (left_ < uint64_t(bits_)) return false;
    while (held_ < bits_) {
      window_ |= uint32_t(*bytes_++) << held_;
      held_ += 8;
    }
    field = window_ & ((1u << bits_) - 1);
    window_ >>= bits_;
    held_ -= bits_;
    left_ -= bits_;
    return true;
  }

  // Whether only the zero bits that fill the last byte remain.
  bool at_end() const { return left_ < 8 && window_ == 0; }

 private:
  const uint8_t* bytes_;
  uint64_t left_;
  int bits_, held_ = 0;
  uint32_t window_ = 0;
};

// Value `index` of a table of int6, which lies in row `row`. The first three quarters of a row are the low bits of three
// planes of bytes, and the last quarter is their high bits.
int int6_at(const Packed& packed, uint64_t index, uint32_t row) {
  const uint64_t quarter = packed.columns / 4, column = index - uint64_t(row) * packed.columns;
  const uint8_t* const plane = packed.values + uint64_t(row) * quarter * 3 + column % quarter;
  const unsigned bits = column < 3 * quarter
                            ? plane[column / quarter * quarter]
                            : plane[0] >> 6 | plane[quarter] >> 6 << 2 | plane[2 * quarter] >> 6 << 4;
  return int((bits & 63) ^ 32) - 32;
}

// The stored value number `index`, in row `row`.
float value_at(const Packed& packed, uint64_t index, uint32_t row) {
  switch (packed.type) {
    case Values::kFloat32: return at<float>(packed.values + 4 * index);
    case Values::kFloat16: return half_to_float(at<uint16_t>(packed.values + 2 * index));
    case Values::kInt8: return float(int8_t(packed.values[index])) * at<float>(packed.scales + 4 * size_t(row));
    default: return float(int6_at(packed, index, row)) * at<float>(packed.scales + 4 * size_t(row));
  }
}

// Whether the stored value number `index` is zero, before its scale; not of int6, which stores every value.
bool is_zero(const Packed& packed, uint64_t index) {
  switch (packed.type) {
    case Values::kFloat32: return (at<uint32_t>(packed.values + 4 * index) & 0x7fffffff) == 0;
    case Values::kFloat16: return (at<uint16_t>(packed.values + 2 * index) & 0x7fff) == 0;
    default: return packed.values[index] == 0;
  }
}

void check_scales(const Packed& packed) {
  if (!has_scales(packed.type)) return;
  for (uint32_t row = 0; row < packed.rows; row++) {
    const uint32_t bits = at<uint32_t>(packed.scales + 4 * size_t(row));
    if (bits == 0 || bits >= 0x7f800000) refuse(packed.name, "a scale that is not a positive number");
  }
}

// Whether all weights of the stored block number `block` are zero.
bool is_zero_block(const Packed& packed, uint64_t block) {
  for (uint64_t i = block << packed.block_bits, end = (block + 1) << packed.block_bits; i < end; i++)
    if (!is_zero(packed, i)) return false;
  return true;
}

// Calls `visit(number of the block, row, first column)` for each stored block, or weight, in order, and sets `start` to where
// each row begins in `visited`, to which it appends.
template <class Item, class Visit>
void each_block(const Packed& packed, std::vector<uint32_t>& start, const std::vector<Item>& visited, Visit visit) {
  if (packed.columns > 65536) refuse(packed.name, "more than 65,536 columns");
  check_scales(packed);
  start.assign(size_t(packed.rows) + 1, 0);
  Fields fields(packed.positions, packed.position_bytes, packed.gap_bits);
  const uint32_t most = packed.gap_bits ? (1u << packed.gap_bits) - 1 : 0;  // this field: skip so many, and go on
  const uint64_t row_blocks = packed.columns >> packed.block_bits;
  uint64_t row_end = row_blocks;
  uint32_t row = 0;
  uint64_t place = 0;
  for (uint64_t block = 0; block < packed.stored >> packed.block_bits; block++, place++) {
    for (uint32_t field = most; packed.gap_bits && field == most;) {
      if (!fields.next(field)) refuse(packed.name, "positions end too early");
      place += field;
      if (place >= row_blocks * packed.rows) refuse(packed.name, "a position outside the matrix");
    }
    for (; place >= row_end; row_end += row_blocks) start[++row] = uint32_t(visited.size());
    if (packed.gap_bits && is_zero_block(packed, block)) refuse(packed.name, "a stored value is zero");
    visit(block, row, uint32_t(place - (row_end - row_blocks)) << packed.block_bits);
  }
  while (row < packed.rows) start[++row] = uint32_t(visited.size());
  if (packed.gap_bits && !fields.at_end()) refuse(packed.name, "more positions than values");
}

}  // namespace

uint32_t crc32(const uint8_t* bytes, size_t size, uint32_t before) {
  static const auto table = make_tables();
  uint32_t c = ~before;
  for (; size >= 8; size -= 8, bytes += 8) {
    const uint32_t low = c ^ (uint32_t(bytes[0]) | uint32_t(bytes[1]) << 8 | uint32_t(bytes[2]) << 16 |
                              uint32_t(bytes[3]) << 24);
    c = table[7][low & 255] ^ table[6][(low >> 8) & 255] ^ table[5][(low >> 16) & 255] ^ table[4][low >> 24] ^
        table[3][bytes[4]] ^ table[2][bytes[5]] ^ table[1][bytes[6]] ^ table[0][bytes[7]];
  }
  for (; size; size--, bytes++) c = (c >> 8) ^ table[0][(c ^ *bytes) & 255];
  return ~c;
}

float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00)
    return magnitude > 0x7c00 ? std::numeric_limits<float>::quiet_NaN()
           : half & 0x8000    ? -std::numeric_limits<float>::infinity()
                              : std::numeric_limits<float>::infinity();
  // A subnormal float16 is counted in units of 2^-24, as an ordinary float: a session may take subnormal floats for zero.
  const uint32_t shifted = (magnitude << 13) + (uint32_t(127 - 15) << 23);
  float value = float(magnitude) * 0x1p-24f;
  if (magnitude >= 0x400) std::memcpy(&value, &shifted, sizeof value);
  return half & 0x8000 ? -value : value;
}

Packed open(const void* data, size_t size, const std::string& name) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  if (size < kHeaderBytes) refuse(name, std::to_string(size) + " bytes are less than a header");
  if (std::memcmp(bytes, "SPDM", 4) != 0) refuse(name, "it does not begin with SPDM");
  if (bytes[4] != kVersion)
    throw PackedError(name + ": packed in format " + std::to_string(bytes[4]) + "; this library reads format " +
                      std::to_string(kVersion));
  if (bytes[5] > 3) refuse(name, "unknown type of values " + std::to_string(bytes[5]));
  if (bytes[6] > 8) refuse(name, "gaps of " + std::to_string(bytes[6]) + " bits");
  if (bytes[7] != 0 && (bytes[7] != kBlockBits || Values(bytes[5]) != Values::kInt8))
    refuse(name, "blocks of 2^" + std::to_string(bytes[7]) + " inputs");
  if (Values(bytes[5]) == Values::kInt6 && bytes[6] != 0) refuse(name, "gaps between values of 6 bits");
  bool unused = true;
  for (size_t i = kUnusedFrom; i < kHeaderBytes; i++) unused = unused && bytes[i] == 0;
  if (!unused) refuse(name, "a reserved byte of the header is not zero");

  Packed packed{};
  packed.name = name;
  packed.type = Values(bytes[5]);
  packed.gap_bits = bytes[6];
  packed.block_bits = bytes[7];
  packed.rows = at<uint32_t>(bytes + 8);
  packed.columns = at<uint32_t>(bytes + 12);
  packed.stored = at<uint64_t>(bytes + 16);
  packed.position_bytes = at<uint64_t>(bytes + 24);
  const uint64_t weights = uint64_t(packed.rows) * packed.columns;
  if (weights == 0 || weights > kMostWeights) refuse(name, std::to_string(weights) + " weights");
  if (packed.stored > weights || (packed.gap_bits == 0 && packed.stored != weights))
    refuse(name, std::to_string(packed.stored) + " values stored of " + std::to_string(weights) + " weights");
  if (packed.columns % (1u << packed.block_bits) != 0 || packed.stored % (1u << packed.block_bits) != 0)
    refuse(name, std::to_string(packed.columns) + " columns and " + std::to_string(packed.stored) + " values, in blocks of four");
  if (packed.type == Values::kInt6 && packed.columns % 4 != 0)
    refuse(name, std::to_string(packed.columns) + " columns of 6 bits, which are no whole bytes");
  if (packed.gap_bits == 0 && packed.position_bytes != 0) refuse(name, "positions where every value is stored");
  if (packed.gap_bits != 0 && (packed.position_bytes == 0) != (packed.stored == 0))
    refuse(name, std::to_string(packed.position_bytes) + " bytes of positions of " + std::to_string(packed.stored) + " values");

  const uint64_t scale_bytes = has_scales(packed.type) ? 4 * uint64_t(packed.rows) : 0;
  const uint64_t value_bytes = bytes_of(packed.type, packed.stored);
  const uint64_t payload = size - kHeaderBytes;
  if (packed.position_bytes > payload || scale_bytes + value_bytes + packed.position_bytes != payload)
    refuse(name, std::to_string(size) + " bytes, which is not what its header asks for");
  packed.scales = bytes + kHeaderBytes;
  packed.values = packed.scales + scale_bytes;
  packed.positions = packed.values + value_bytes;

  uint8_t header[kHeaderBytes];
  std::memcpy(header, bytes, kHeaderBytes);
  std::memset(header + kChecksumAt, 0, 4);
  if (crc32(bytes + kHeaderBytes, payload, crc32(header, kHeaderBytes)) != at<uint32_t>(bytes + kChecksumAt))
    refuse(name, "the checksum is wrong");
  return packed;
}

SparseRows read_rows(const Packed& packed) {
  SparseRows result;
  result.rows = packed.rows;
  result.columns = packed.columns;
  result.column.reserve(packed.stored);
  result.value.reserve(packed.stored);
  const uint32_t size = 1u << packed.block_bits;
  each_block(packed, result.start, result.value, [&](uint64_t block, uint32_t row, uint32_t column) {
    for (uint32_t i = 0; i < size; i++) {
      const float value = value_at(packed, block * size + i, row);
      if (!std::isfinite(value)) refuse(packed.name, "a value that is not finite");
      if (value == 0.0f) continue;
      result.column.push_back(uint16_t(column + i));
      result.value.push_back(value);
    }
  });
  return result;
}

GroupRows read_groups(const Packed& packed) {
  if (packed.block_bits == 0) refuse(packed.name, "single weights where blocks of four are needed");
  GroupRows result;
  result.rows = packed.rows;
  result.columns = packed.columns;
  result.group.reserve(packed.stored >> kBlockBits);
  result.value.reserve(packed.stored);
  each_block(packed, result.start, result.group, [&](uint64_t block, uint32_t row, uint32_t column) {
    bool zero = true;
    for (int i = 0; i < 1 << kBlockBits; i++) {
      const uint64_t index = (block << kBlockBits) + i;
      if (!std::isfinite(value_at(packed, index, row))) refuse(packed.name, "a value that is not finite");
      zero = zero && is_zero(packed, index);
    }
    if (zero) return;  // one of a matrix that stores every value
    const uint8_t* values = packed.values + (block << kBlockBits);
    result.group.push_back(uint16_t(column >> kBlockBits));
    result.value.insert(result.value.end(), values, values + (1 << kBlockBits));
  });
  for (uint32_t row = 0; row < packed.rows; row++) result.scale.push_back(at<float>(packed.scales + 4 * size_t(row)));
  return result;
}

namespace {

// Where each of some consecutive rows starts, when the first starts at 0.
std::vector<uint32_t> starts_of(const std::vector<uint32_t>& all, uint32_t first, uint32_t count) {
  std::vector<uint32_t> start(all.begin() + first, all.begin() + first + count + 1);
  for (uint32_t& at : start) at -= all[first];
  return start;
}

}  // namespace

SparseRows rows_of(const SparseRows& all, uint32_t first, uint32_t count) {
  const uint32_t begin = all.start[first], end = all.start[first + count];
  return {count, all.columns, starts_of(all.start, first, count),
          {all.column.begin() + begin, all.column.begin() + end},
          {all.value.begin() + begin, all.value.begin() + end}};
}

GroupRows rows_of(const GroupRows& all, uint32_t first, uint32_t count) {
  const uint32_t begin = all.start[first], end = all.start[first + count];
  return {count, all.columns, starts_of(all.start, first, count),
          {all.group.begin() + begin, all.group.begin() + end},
          {all.value.begin() + 4 * ptrdiff_t(begin), all.value.begin() + 4 * ptrdiff_t(end)},
          {all.scale.begin() + first, all.scale.begin() + first + count}};
}

std::vector<float> read_vector(const Packed& packed, size_t size) {
  if (packed.rows != 1 || packed.columns != size || packed.gap_bits != 0)
    throw PackedError(packed.name + ": " + std::to_string(packed.rows) + " x " + std::to_string(packed.columns) +
                      " where a vector of " + std::to_string(size) + " is needed");
  check_scales(packed);
  std::vector<float> result(size);
  for (size_t i = 0; i < size; i++) {
    result[i] = value_at(packed, i, 0);
    if (!std::isfinite(result[i])) refuse(packed.name, "a value that is not finite");
  }
  return result;
}

void check_table(const Packed& packed, uint32_t columns) {
  if (packed.columns != columns || packed.gap_bits != 0)
    throw PackedError(packed.name + ": " + std::to_string(packed.columns) + " columns" +
                      (packed.gap_bits ? ", stored sparse," : "") + " where a table of " + std::to_string(columns) +
                      " columns is needed");
  check_scales(packed);
  for (uint32_t row = 0; row < packed.rows; row++) {
    float sum = 0;  // of zeros, or not finite as soon as one term is not
    for (uint64_t i = uint64_t(row) * columns, end = i + columns; i < end; i++) sum += 0.0f * value_at(packed, i, row);
    if (!std::isfinite(sum)) refuse(packed.name, "a value that is not finite");
  }
}

}  // namespace sparse_cpu
