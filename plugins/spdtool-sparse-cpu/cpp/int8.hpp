// Products of 8-bit numbers: activations u8, weights s8 in groups of four inputs of one row.
//
// The arithmetic is that of spdtool/models/int8.py. Its sums are integers, so every instruction set has the same ones.
//
// A *rounded tile* holds the columns (tokens) of a tile in 8 bits, with a scale and a zero point for each column and chunk of
// kInputsOfChunk inputs. Four consecutive inputs of a column, a group, are one 32-bit word of four bytes where the machine
// multiplies those, else two words of two 16-bit numbers; a group's words stand in planes [word][column]. So one instruction
// multiplies a group's weights, broadcast, with a vector of columns.
//
// int8_kernels.cpp is compiled once for each instruction set, under the same rules as kernels.cpp.
#pragma once

#include "kernels.hpp"

namespace sparse_cpu {

constexpr uint32_t kInputsOfGroup = 4;
constexpr uint32_t kInputsOfChunk = 768;  // INPUT_CHUNK of spdtool/models/int8.py
constexpr size_t kSpareSteps = 2;         // behind the last index: kernels load eight bytes at a time

// The groups of at most kRowsOfBlock rows and kInputsOfChunk inputs. Rows are ordered by their number of groups, and taken in
// bundles of eight, as those of Block in kernels.hpp.
struct Int8Block {
  uint32_t row, depth;  // its first
  uint32_t first_bundle, bundles;
  size_t first_entry;  // in `group` and `weights`
};

// A matrix in such blocks. Not owned.
struct Int8View {
  const Int8Block* blocks;
  const uint32_t* steps;   // of each bundle
  const uint16_t* group;   // of each entry, counted within its chunk
  const int32_t* weights;  // of each entry, `Int8Kernels::words` words
  const uint16_t* order;   // for each slot of a bundle, its row within the block
  const int32_t* sum;      // for each slot, the sum of its weights
  const float* scale;      // of every row
  const float* bias;       // of every row
};

// Scales and zero points are [chunk][column], the data [group][word][column].
struct RoundedTile {
  float* scale;
  int32_t* zero;
  int32_t* data;
};

struct Int8Kernels {
  const char* name;
  int lanes;  // as those of the other kernels of this machine

  // 32-bit words of a group, in a tile and among weights: 1, or 2 where numbers take 16 bits.
  int words;

  // x = activation(x) for a tile of `rows` rows, which are a multiple of four, and x rounded. `range`: what add_layer_norm
  // wrote of x, which is one chunk then and has no activation; may be null, and may lie where `out` has its scales.
  void (*round)(Activation, float* x, size_t rows, int vectors, RoundedTile out, const float* range);

  // y (+)= W x over blocks [begin, end), as Kernels::multiply. `origin`: the input that the tile begins with, the first of
  // its chunk.
  void (*multiply)(const Int8View&, size_t begin, size_t end, const RoundedTile& x, uint32_t origin, TileOut y,
                   int vectors);
};

// Those that belong to `best_kernels`.
const Int8Kernels& best_int8_kernels();

inline size_t chunks_of(size_t rows) { return (rows + kInputsOfChunk - 1) / kInputsOfChunk; }

// 32-bit words of one column of a rounded tile.
inline size_t rounded_words(size_t rows, int words) { return rows / kInputsOfGroup * size_t(words) + 2 * chunks_of(rows); }

// The rounded tile of `rows` rows and `width` columns that begins at `place`.
inline RoundedTile rounded_tile(int32_t* place, size_t rows, size_t width) {
  int32_t* const zero = place + chunks_of(rows) * width;
  return {reinterpret_cast<float*>(place), zero, zero + chunks_of(rows) * width};
}

}  // namespace sparse_cpu
