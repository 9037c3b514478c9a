// Reads the packed form of one matrix, as it is in the model file.
//
// The form itself is described where it is written, in spdtool_sparse_cpu/packing.py. Everything here treats the bytes as
// hostile: each count is checked before it is used, and a fault is thrown as PackedError with the parameter's name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace sparse_cpu {

struct PackedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Values : uint8_t { kFloat32 = 0, kFloat16 = 1, kInt8 = 2, kInt6 = 3 };

// The header, and pointers to scales, values and positions. Does not own the bytes.
struct Packed {
  Values type;
  int gap_bits;    // 0: every value is stored
  int block_bits;  // a block is 2^block_bits consecutive inputs of a row, stored whole: 0, or 2 (int8 alone)
  uint32_t rows, columns;
  uint64_t stored;
  const uint8_t* scales;     // float32[rows], only of int8 and int6
  const uint8_t* values;     // `stored` of them, in row-major order; int6: rows of three planes, see packing.py
  const uint8_t* positions;  // gaps, see packing.py
  uint64_t position_bytes;
  std::string name;  // for errors
};

// The non-zero values of a matrix row by row: those of row r are at [start[r], start[r + 1]).
struct SparseRows {
  uint32_t rows = 0, columns = 0;
  std::vector<uint32_t> start;
  std::vector<uint16_t> column;
  std::vector<float> value;

  double density() const { return rows == 0 ? 0.0 : double(value.size()) / (double(rows) * columns); }
};

// The blocks of four inputs of a matrix row by row, as SparseRows.
struct GroupRows {
  uint32_t rows = 0, columns = 0;
  std::vector<uint32_t> start;
  std::vector<uint16_t> group;  // the first input of a block, divided by four
  std::vector<int8_t> value;    // four of each block
  std::vector<float> scale;     // of each row
};

// Checks header, sizes and checksum. Throws PackedError.
Packed open(const void* bytes, size_t size, const std::string& name);

// Reads the nonzero values without expanding the dense matrix. Throws PackedError: damaged, not finite, or over 65,536 columns.
SparseRows read_rows(const Packed& packed);

// Reads a matrix whose zeros are in blocks. Throws PackedError as `read_rows`.
GroupRows read_groups(const Packed& packed);

// Some consecutive rows.
SparseRows rows_of(const SparseRows& all, uint32_t first, uint32_t count);
GroupRows rows_of(const GroupRows& all, uint32_t first, uint32_t count);

// Reads a vector (one row, every value stored) of `size` numbers. Throws PackedError.
std::vector<float> read_vector(const Packed& packed, size_t size);

// Checks a table whose rows are looked up one by one later: every value must be stored, and finite. Throws PackedError.
void check_table(const Packed& packed, uint32_t columns);

uint32_t crc32(const uint8_t* bytes, size_t size, uint32_t before = 0);

float half_to_float(uint16_t half);

}  // namespace sparse_cpu
