// The inner loops, one table of functions for each instruction set.
//
// kernels.cpp is compiled once for each instruction set, with its own compiler flags, and `best_kernels` chooses at load
// time. It must include nothing but this header and intrinsics: an inline function of the standard library, compiled there
// for AVX-512, could be the copy that the linker keeps for everybody.
//
// Activations lie in *tiles*. A tile is a matrix [rows][width] of some columns (tokens) of the batch, with `width` a
// whole number of vectors, so that one row of a tile is 1 to 4 vectors, aligned, that fit into registers. Every nonzero
// weight is then one broadcast and `vectors` multiply-adds on whole vectors, whatever the pattern of the zeros is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparse_cpu {

constexpr int kWidestTile = 4;          // vectors
constexpr int kBundle = 8;              // rows that are multiplied together
constexpr size_t kAlignment = 64;       // bytes; of tiles and of everything that vectors are loaded from
constexpr uint32_t kDepthOfBlock = 192; // inputs of a block; at most 256, for the 8-bit indexes
constexpr uint32_t kRowsOfBlock = 192;  // outputs of a block
constexpr size_t kSpareValues = 4;      // zeros behind the last weight: kernels load four at a time, and may need two

enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh };

// Bundles of a block that have the same number of steps.
struct Run {
  uint32_t steps, bundles;
};

// A block of the weights: at most kRowsOfBlock outputs x kDepthOfBlock inputs, so that the inputs of one tile that it reads
// stay in the first-level cache. Its rows are ordered by their number of nonzeros and taken in bundles of eight; step s of
// a bundle holds the s-th nonzero of each of its rows. Rows of a bundle that are shorter end in zero weights.
struct Block {
  uint32_t row, rows;      // outputs
  uint32_t depth, depths;  // inputs
  uint32_t first_run, runs;
  size_t first_slot;  // in `order`
  size_t first_entry;  // in `index` and `value`
};

// A matrix in blocks, as the kernels see it. Not owned.
struct MatrixView {
  const Block* blocks;
  const Run* runs;
  const uint16_t* order;  // for each slot of a bundle, its row within the block; kBundle spare ones in the end
  const uint8_t* index;   // for each entry, its input within the block; absent (null) where every weight is stored
  const float* value;
  const float* bias;  // of every row
};

// Where a tile with the activations of some rows begins: row r of column 0 is at data[(r - origin) * width].
struct TileIn {
  const float* data;
  uint32_t origin;
};
struct TileOut {
  float* data;
  uint32_t origin;
};

// Attention of `queries` consecutive columns of one tile, in one head, to all columns of one sequence.
struct AttentionTask {
  // A stretch of the sequence's columns in one tile; pointers at the head's first row.
  struct Keys {
    const float *key, *value;
    size_t width;    // of that tile
    uint32_t count;  // columns
  };
  const float* query;  // at the head's first row and the first query's column, already scaled
  size_t query_width;
  float* context;  // out, like `query`
  size_t context_width;
  uint32_t queries;  // at most kWidestTile vectors
  uint32_t head_size;
  const Keys* keys;
  uint32_t key_stretches;
  float* scores;  // scratch: (all keys + 8) x (vectors of queries)
};

// Where the queries and keys of a task stand in their sequence. The scores are those of an AttentionTask: a row of as many
// whole vectors as hold the queries for each key. A pair's distance is the query's position minus the key's.
struct ScorePositions {
  const int32_t* query;  // ascending; of every lane of a row of scores
  const int32_t* key;    // ascending
  uint32_t queries, keys;
};

// Scores that depend on the content of one token and on the bucket of the distance, as DeBERTa has them.
struct BucketScores {
  const float* of_query;  // [bucket - lowest][lane of a row of scores]
  const float* of_key;    // [bucket - lowest][key_width]
  size_t key_width;
  int32_t lowest;         // bucket
  const int32_t* bucket;  // of distance 0; before and behind it those of every other distance
};

struct Kernels {
  const char* name;
  int lanes;  // floats of a vector

  // Density from which on it is faster to multiply all weights; measured by cpp/benchmarks/products.cpp.
  double dense_above;

  // y (+)= W x over blocks [begin, end) of a matrix, for a tile of `vectors` vectors; blocks of depth 0 begin with the bias.
  void (*multiply)(const MatrixView&, size_t begin, size_t end, TileIn x, TileOut y, int vectors);

  // For every entry of one block of a matrix, the sum over the columns of a tile of x[input] * y[row], added to `sums` or, if
  // `first`, written there: for each bundle row after row, its steps made up to a multiple of four.
  void (*sample)(const MatrixView&, size_t block, TileIn x, TileIn y, int vectors, float* sums, bool first);

  void (*activate)(Activation, float* x, size_t size);

  // x *= y
  void (*scale_by)(float* x, const float* y, size_t size);

  // x += y, out = layer_norm(x) over `rows`, column by column; `y` may be null, `out` may be x. Writes to `range`, which may
  // be null too, the least number of each column of `out`, or 0 where that is less, and then the largest, or 0.
  void (*add_layer_norm)(float* x, const float* y, float* out, size_t rows, int vectors, const float* gain,
                         const float* bias, float epsilon, float* range);

  // Rotates rows d and d + half of each head of a tile, `half` being half a head: by an angle for each d and column.
  void (*rotate)(float* x, size_t heads, size_t half, size_t width, const float* cosine, const float* sine);

  void (*attend)(const AttentionTask&);

  // The two halves of `attend`, for what is added to the scores between them: scores alone, then softmax and context.
  void (*score)(const AttentionTask&);
  void (*mix)(const AttentionTask&);

  // Hides keys that are further than `window` from a query.
  void (*hide_far)(float* scores, const ScorePositions&, int32_t window);

  // Adds bias[distance] to each score; `bias` points to that of distance 0.
  void (*add_by_distance)(float* scores, const ScorePositions&, const float* bias);

  void (*add_by_bucket)(float* scores, const ScorePositions&, const BucketScores&);

  // sum[i] += one row of a table: float32, float16 bits, or int8 or int6 times a scale; `size` of int6 is a multiple of four.
  void (*add_float)(float* sum, const uint8_t* row, size_t size);
  void (*add_half)(float* sum, const uint8_t* row, size_t size);
  void (*add_int8)(float* sum, const uint8_t* row, size_t size, float scale);
  void (*add_int6)(float* sum, const uint8_t* row, size_t size, float scale);

  // Rows of `size` numbers, one for each column, into a tile of `width` columns, and back. A null row is all zeros.
  void (*into_tile)(const float* const* rows, size_t width, size_t size, float* tile);
  void (*out_of_tile)(const float* tile, size_t width, size_t size, float* const* rows);
};

// The best of this machine. SPDTOOL_SPARSE_CPU_ISA=avx2 or =baseline, for example, takes a lesser one, for tests.
const Kernels& best_kernels();

}  // namespace sparse_cpu
