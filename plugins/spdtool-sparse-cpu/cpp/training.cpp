#include "training.hpp"

#include <algorithm>
#include <cstring>

namespace sparse_cpu {
namespace {

constexpr size_t kMostColumns = kWidestTile * 16;
constexpr uint32_t kBlockRows = 384, kBlockDepth = 192;  // the best of a few, by benchmarks/sparse_training.py

// Pointers to the rows of a batch that stand in the columns of a tile; null where the tile is wider than the batch.
template <class T>
void column_rows(const Tiles::Tile& tile, T* rows, size_t n, size_t stride, T** out) {
  for (size_t c = 0; c < tile.width; c++) out[c] = tile.column + c < n ? rows + (tile.column + c) * stride : nullptr;
}

SparseRows alive(const uint8_t* dead, uint32_t rows, uint32_t columns, size_t row_stride, size_t column_stride) {
  SparseRows found{rows, columns, {0}, {}, {}};
  for (uint32_t r = 0; r < rows; r++) {
    for (uint32_t c = 0; c < columns; c++)
      if (!dead[r * row_stride + c * column_stride]) found.column.push_back(uint16_t(c));
    found.start.push_back(uint32_t(found.column.size()));
  }
  return found;
}

// Offset of each entry's weight in the dense matrix, given the strides of the pattern's rows and columns in it.
std::vector<uint32_t> places(BlockedPattern& pattern, const SparseRows& weights, size_t row_stride, size_t column_stride) {
  std::vector<uint32_t> of_nonzero(weights.column.size() + 1, 0), place(pattern.entries());
  for (uint32_t r = 0; r < weights.rows; r++)
    for (uint32_t i = weights.start[r]; i < weights.start[r + 1]; i++)
      of_nonzero[i + 1] = uint32_t(r * row_stride + weights.column[i] * column_stride + 1);
  std::transform(pattern.source.begin(), pattern.source.end(), place.begin(), [&](uint32_t s) { return of_nonzero[s]; });
  std::vector<uint32_t>().swap(pattern.source);
  return place;
}

template <class Side>
Side side_of(const uint8_t* dead, uint32_t rows, uint32_t columns, size_t row_stride, size_t column_stride) {
  const SparseRows weights = alive(dead, rows, columns, row_stride, column_stride);
  Side side{BlockedPattern(weights, false, kBlockRows, kBlockDepth), {}};
  side.place = places(side.pattern, weights, row_stride, column_stride);
  return side;
}

// Size of the sampled products of a bundle: each of its rows is padded to a multiple of four.
size_t room(uint32_t steps) { return kBundle * ((size_t(steps) + 3) / 4 * 4); }

}  // namespace

TrainingProducts::TrainingProducts(const uint8_t* dead, uint32_t rows, uint32_t columns)
    : forward_(side_of<Side>(dead, rows, columns, columns, 1)), backward_(side_of<Side>(dead, columns, rows, 1, columns)) {}

void TrainingProducts::gather(const Side& side, uint32_t row_block, const float* weight, float* value) {
  const BlockedPattern& pattern = side.pattern;
  const size_t first = pattern.at(pattern.block(row_block)).first_entry;
  const size_t end = row_block + 1 < pattern.row_blocks() ? pattern.at(pattern.block(row_block + 1)).first_entry
                                                          : pattern.entries();
  for (size_t entry = first; entry < end; entry++) {
    const uint32_t place = side.place[entry];
    value[entry] = place ? weight[place - 1] : 0.0f;
  }
}

// Computes one tile while it is in the cache: from rows to a tile, the product, and back to rows.
void TrainingProducts::multiply(const Side& side, const float* value, const float* bias, const Batch& batch, size_t tile,
                                const Kernels& kernels) {
  thread_local Buffer<float> kept;
  const BlockedPattern& pattern = side.pattern;
  const Tiles::Tile& shape = batch.tiles[tile];
  float* const in = batch.in + batch.tiles.offset(tile, pattern.columns());
  const float* from[kMostColumns];
  column_rows(shape, batch.rows, batch.n, pattern.columns(), from);
  kernels.into_tile(from, shape.width, pattern.columns(), in);
  if (batch.out == nullptr) return;
  float* const out = kept.grow(kBlockRows * kMostColumns);
  for (uint32_t b = 0; b < pattern.row_blocks(); b++) {
    const uint32_t r0 = pattern.first_row(b), r1 = pattern.first_row(b + 1);
    kernels.multiply(pattern.view(pattern.index().data(), value, bias), pattern.block(b), pattern.block(b + 1), {in, 0},
                     {out, r0}, shape.vectors);
    float* to[kMostColumns];
    column_rows(shape, batch.out + r0, batch.n, pattern.rows(), to);
    kernels.out_of_tile(out, shape.width, r1 - r0, to);
  }
}

// Blocks [begin, end) of the weight gradient. Tile after tile, so that a tile is read from memory once; for each weight the
// tiles come in the same order, whoever has its block.
void TrainingProducts::sample(size_t begin, size_t end, const float* x, const float* dy, const Tiles& tiles, float* dweight,
                              const Kernels& kernels) const {
  thread_local Buffer<float> kept;
  const BlockedPattern& pattern = forward_.pattern;
  const MatrixView view = pattern.view(pattern.index().data(), nullptr, nullptr);
  std::vector<size_t> first(1, 0);
  for (size_t b = begin; b < end; b++) {
    size_t size = 0;
    pattern.each_bundle(pattern.at(b), [&](const uint16_t*, size_t, uint32_t steps) { size += room(steps); });
    first.push_back(first.back() + size);
  }
  float* const sums = kept.grow(first.back());
  for (size_t t = 0; t < tiles.count(); t++)
    for (size_t b = begin; b < end; b++)
      kernels.sample(view, b, {x + tiles.offset(t, columns()), 0}, {dy + tiles.offset(t, rows()), 0}, tiles[t].vectors,
                     sums + first[b - begin], t == 0);
  for (size_t b = begin; b < end; b++) {
    const Block& block = pattern.at(b);
    for (uint32_t r = 0; r < block.rows; r++)
      std::memset(dweight + size_t(block.row + r) * columns() + block.depth, 0, block.depths * sizeof(float));
    const float* sum = sums + first[b - begin];
    pattern.each_bundle(block, [&](const uint16_t*, size_t entry, uint32_t steps) {
      for (int r = 0; r < kBundle; r++, sum += room(steps) / kBundle)
        for (uint32_t s = 0; s < steps; s++)
          if (const uint32_t place = forward_.place[entry + size_t(s) * kBundle + r]) dweight[place - 1] = sum[s];
    });
  }
}

void TrainingProducts::forward(const float* weight, const float* bias, const float* x, size_t n, float* kept_tiles, float* y,
                               const Kernels& kernels, const Lender& lender, size_t threads) const {
  if (n == 0) return;
  thread_local Buffer<float> kept_value, kept_in, kept_none;
  const Tiles tiles(n, kernels.lanes, 1);
  const BlockedPattern& pattern = forward_.pattern;
  float* const value = kept_value.grow(pattern.entries() + kSpareValues);
  if (bias == nullptr) bias = kept_none.grow(rows());
  const Batch batch{tiles, x, n, kept_tiles ? kept_tiles : kept_in.grow(tile_size(n, kernels)), y};
  Team::run({{pattern.row_blocks(), [&](size_t b, size_t) { gather(forward_, uint32_t(b), weight, value); }},
             {tiles.count(), [&](size_t t, size_t) { multiply(forward_, value, bias, batch, t, kernels); }}},
            lender, threads);
}

void TrainingProducts::backward(const float* weight, const float* dy, size_t n, const float* kept_tiles, float* dx,
                                float* dweight, const Kernels& kernels, const Lender& lender, size_t threads) const {
  if (n == 0) {
    if (dweight) std::memset(dweight, 0, size_t(rows()) * columns() * sizeof(float));
    return;
  }
  thread_local Buffer<float> kept_value, kept_in, kept_none;
  const Tiles tiles(n, kernels.lanes, 1);
  const BlockedPattern& pattern = backward_.pattern;
  float* const value = kept_value.grow(pattern.entries() + kSpareValues);
  const float* const none = kept_none.grow(columns());
  const Batch batch{tiles, dy, n, kept_in.grow(tiles.columns() * rows()), dx};
  const size_t blocks = dweight ? forward_.pattern.block(forward_.pattern.row_blocks()) : 0, parts = std::min(blocks, threads);
  std::vector<Phase> phases;
  if (dx) phases.push_back({pattern.row_blocks(), [&](size_t b, size_t) { gather(backward_, uint32_t(b), weight, value); }});
  phases.push_back({tiles.count(), [&](size_t t, size_t) { multiply(backward_, value, none, batch, t, kernels); }});
  if (parts > 0)
    phases.push_back({parts, [&](size_t part, size_t) {
                        sample(part * blocks / parts, (part + 1) * blocks / parts, kept_tiles, batch.in, tiles, dweight,
                               kernels);
                      }});
  Team::run(phases, lender, threads);
}

}  // namespace sparse_cpu
