#include "linear.hpp"

#include <chrono>

#include "buffer.hpp"
#include "tiles.hpp"

namespace sparse_cpu {
namespace {

// Pointers to the rows of a batch that stand in the columns of a tile; null where the tile is wider than the batch.
template <class T>
void column_rows(const Tiles::Tile& tile, T* rows, size_t n, size_t stride, size_t first, T** out) {
  for (size_t c = 0; c < tile.width; c++) out[c] = tile.column + c < n ? rows + (tile.column + c) * stride + first : nullptr;
}

constexpr size_t kMostColumns = kWidestTile * 16;

}  // namespace

void linear(const BlockedMatrix& weights, Activation activation, const float* x, size_t n, float* y,
            const Kernels& kernels, const Lender& lender) {
  if (n == 0) return;
  const size_t threads = most_threads(), rows = weights.rows(), columns = weights.columns();
  const Tiles tiles(n, kernels.lanes, threads);
  const size_t parts = tiles.splits() ? weights.row_blocks() : 1;
  thread_local Buffer<float> kept;
  float* const in = kept.grow(tiles.columns() * (columns + rows));
  float* const out = in + tiles.columns() * columns;

  const Phase gather{tiles.count(), [&](size_t t, size_t) {
                       const float* from[kMostColumns];
                       column_rows(tiles[t], x, n, columns, 0, from);
                       kernels.into_tile(from, tiles[t].width, columns, in + tiles.offset(t, columns));
                     }};
  const Phase multiply{
      tiles.count() * parts, [&](size_t item, size_t) {
        const size_t t = item / parts, part = item % parts;
        const uint32_t b0 = uint32_t(parts == 1 ? 0 : part), b1 = parts == 1 ? weights.row_blocks() : b0 + 1;
        const uint32_t r0 = weights.first_row(b0), r1 = weights.first_row(b1);
        float* tile = out + tiles.offset(t, rows) + r0 * tiles[t].width;
        kernels.multiply(weights.view(), weights.block(b0), weights.block(b1), {in + tiles.offset(t, columns), 0},
                         {tile, r0}, tiles[t].vectors);
        kernels.activate(activation, tile, (r1 - r0) * tiles[t].width);
        float* to[kMostColumns];
        column_rows(tiles[t], y, n, rows, r0, to);
        kernels.out_of_tile(tile, tiles[t].width, r1 - r0, to);
      }};
  Team::run({gather, multiply}, lender, threads);
}

double product_seconds(const BlockedMatrix& weights, size_t tokens, size_t repeats, const Kernels& kernels) {
  using Clock = std::chrono::steady_clock;
  const Tiles tiles(tokens, kernels.lanes, 1);
  Buffer<float> x(tiles.columns() * weights.columns()), y(tiles.columns() * weights.rows());
  for (size_t i = 0; i < x.size(); i++) x[i] = float(i % 7);
  const auto start = Clock::now();
  for (size_t repeat = 0; repeat < repeats; repeat++)
    for (uint32_t block = 0; block < weights.row_blocks(); block++)
      for (size_t t = 0; t < tiles.count(); t++)
        kernels.multiply(weights.view(), weights.block(block), weights.block(block + 1),
                         {x.data() + tiles.offset(t, weights.columns()), 0},
                         {y.data() + tiles.offset(t, weights.rows()), 0}, tiles[t].vectors);
  return std::chrono::duration<double>(Clock::now() - start).count() / double(repeats);
}

}  // namespace sparse_cpu
