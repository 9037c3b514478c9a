#include "training.hpp"

#include <algorithm>
#include <cstring>

namespace sparse_cpu {
namespace {

constexpr size_t kMostColumns = kWidestTile * 16;

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

// Where each entry's weight stands in the dense matrix, given the strides of the pattern's rows and columns in it.
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
  Side side{BlockedPattern(weights, false), {}};
  side.place = places(side.pattern, weights, row_stride, column_stride);
  return side;
}

void into_tiles(const Tiles& tiles, size_t t, const float* rows, size_t n, size_t size, float* out, const Kernels& kernels) {
  const float* from[kMostColumns];
  column_rows(tiles[t], rows, n, size, from);
  kernels.into_tile(from, tiles[t].width, size, out + tiles.offset(t, size));
}

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

// One row block of one tile, which is laid out in rows of `y` at once.
void TrainingProducts::multiply(const Side& side, const float* value, const float* bias, const float* in,
                                const Tiles& tiles, size_t item, float* out, float* y, size_t n, const Kernels& kernels) {
  const BlockedPattern& pattern = side.pattern;
  const size_t t = item / pattern.row_blocks();
  const uint32_t b = uint32_t(item % pattern.row_blocks()), r0 = pattern.first_row(b), r1 = pattern.first_row(b + 1);
  kernels.multiply(pattern.view(pattern.index().data(), value, bias), pattern.block(b), pattern.block(b + 1),
                   {in + tiles.offset(t, pattern.columns()), 0}, {out, r0}, tiles[t].vectors);
  float* to[kMostColumns];
  column_rows(tiles[t], y + r0, n, pattern.rows(), to);
  kernels.out_of_tile(out, tiles[t].width, r1 - r0, to);
}

void TrainingProducts::sample(size_t b, const float* x, const float* dy, const Tiles& tiles, float* dweight,
                              const Kernels& kernels) const {
  const BlockedPattern& pattern = forward_.pattern;
  const Block& block = pattern.at(b);
  thread_local Buffer<float> kept;
  float* const sums = kept.grow(kBundle * size_t(pattern.rows()) * (block.depths + 4));
  const MatrixView view = pattern.view(pattern.index().data(), nullptr, nullptr);
  for (size_t t = 0; t < tiles.count(); t++)
    kernels.sample(view, b, {x + tiles.offset(t, columns()), 0}, {dy + tiles.offset(t, rows()), 0}, tiles[t].vectors, sums,
                   t == 0);
  for (uint32_t r = 0; r < block.rows; r++)
    std::memset(dweight + size_t(block.row + r) * columns() + block.depth, 0, block.depths * sizeof(float));
  const float* sum = sums;
  pattern.each_bundle(block, [&](const uint16_t*, size_t first, uint32_t steps) {
    for (int r = 0; r < kBundle; r++, sum += (steps + 3) / 4 * 4)
      for (uint32_t s = 0; s < steps; s++)
        if (const uint32_t place = forward_.place[first + size_t(s) * kBundle + r]) dweight[place - 1] = sum[s];
  });
}

void TrainingProducts::forward(const float* weight, const float* bias, const float* x, size_t n, float* kept_tiles, float* y,
                               const Kernels& kernels, const Lender& lender) const {
  if (n == 0) return;
  const Tiles tiles(n, kernels.lanes, 1);
  const BlockedPattern& pattern = forward_.pattern;
  thread_local Buffer<float> kept_value, kept_in, kept_none;
  float* const value = kept_value.grow(pattern.entries() + kSpareValues);
  float* const in = kept_tiles ? kept_tiles : kept_in.grow(tile_size(n, kernels));
  if (bias == nullptr) bias = kept_none.grow(rows());
  const Phase prepare{tiles.count() + pattern.row_blocks(), [&](size_t item, size_t) {
                        if (item < tiles.count()) return into_tiles(tiles, item, x, n, columns(), in, kernels);
                        gather(forward_, uint32_t(item - tiles.count()), weight, value);
                      }};
  const Phase work{tiles.count() * pattern.row_blocks(), [&](size_t item, size_t) {
                     thread_local Buffer<float> scratch;
                     float* const out = scratch.grow(kRowsOfBlock * kMostColumns);
                     multiply(forward_, value, bias, in, tiles, item, out, y, n, kernels);
                   }};
  Team::run({prepare, work}, lender, most_threads());
}

void TrainingProducts::backward(const float* weight, const float* dy, size_t n, const float* kept_tiles, float* dx,
                                float* dweight, const Kernels& kernels, const Lender& lender) const {
  if (n == 0) {
    if (dweight) std::memset(dweight, 0, size_t(rows()) * columns() * sizeof(float));
    return;
  }
  const Tiles tiles(n, kernels.lanes, 1);
  const BlockedPattern& pattern = backward_.pattern;
  thread_local Buffer<float> kept_value, kept_in, kept_none;
  float* const value = kept_value.grow(pattern.entries() + kSpareValues);
  float* const in = kept_in.grow(tiles.columns() * rows());
  const float* const none = kept_none.grow(columns());
  const Phase prepare{tiles.count() + (dx ? pattern.row_blocks() : 0), [&](size_t item, size_t) {
                        if (item < tiles.count()) return into_tiles(tiles, item, dy, n, rows(), in, kernels);
                        gather(backward_, uint32_t(item - tiles.count()), weight, value);
                      }};
  const size_t blocks = dweight ? forward_.pattern.block(forward_.pattern.row_blocks()) : 0;
  const Phase work{blocks + (dx ? tiles.count() * pattern.row_blocks() : 0), [&](size_t item, size_t) {
                     if (item < blocks) return sample(item, kept_tiles, in, tiles, dweight, kernels);
                     thread_local Buffer<float> scratch;
                     float* const out = scratch.grow(kRowsOfBlock * kMostColumns);
                     multiply(backward_, value, none, in, tiles, item - blocks, out, dx, n, kernels);
                   }};
  Team::run({prepare, work}, lender, most_threads());
}

}  // namespace sparse_cpu
