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

// The keys and values of one head and sequence. Keys stand side by side, without the gaps between tiles. A key has one
// scale, and so has each input of the values, over all keys. Where memory lies behind the last key, it is not read.
struct RoundedKeys {
  uint32_t count, width;  // keys, and the numbers between rows
  float* scale;           // of each key
  float* sum;             // of each key: of its numbers
  int32_t* key;           // [group of inputs][word][key]
  float* value_scale;     // of each input
  int32_t* value;         // [input][group of keys][word]
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

  // Rounds the keys and values of a sequence's stretches; `head_size` is a multiple of four.
  void (*round_keys)(const AttentionTask::Keys*, uint32_t stretches, uint32_t head_size, const RoundedKeys& out);

  // As Kernels::attend, with the queries, the probabilities and these keys and values in 8 bits. The task's own keys are
  // not read. Its scratch is `rounded_scores_words` words.
  void (*attend)(const AttentionTask&, const RoundedKeys&);
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

// Keys that sums of 32 bits have room for, and inputs whose sums float32 holds exactly.
constexpr size_t kMostRoundedKeys = size_t(1) << 16, kMostRoundedInputs = 512;

inline size_t rounded_keys_width(size_t count, int lanes) {
  return (count + size_t(lanes) + kInputsOfGroup - 1) / kInputsOfGroup * kInputsOfGroup;
}

// 32-bit words of the keys and values of one head.
inline size_t rounded_keys_words(size_t width, size_t head_size, int words) {
  return 2 * width + head_size + 2 * width * (head_size / kInputsOfGroup) * size_t(words);
}

// The keys and values of one head that begin at `place`.
inline RoundedKeys rounded_keys(int32_t* place, size_t count, size_t head_size, int words, int lanes) {
  const size_t width = rounded_keys_width(count, lanes);
  float* const scale = reinterpret_cast<float*>(place);
  int32_t* const key = place + 2 * width + head_size;
  return {uint32_t(count), uint32_t(width), scale, scale + width, key, scale + 2 * width,
          key + width * (head_size / kInputsOfGroup) * size_t(words)};
}

// The scores of `keys` keys with `width` queries, and the queries in 8 bits.
inline size_t rounded_scores_words(size_t keys, size_t width, size_t head_size, int words) {
  return (keys + head_size / kInputsOfGroup * size_t(words)) * width;
}

}  // namespace sparse_cpu
