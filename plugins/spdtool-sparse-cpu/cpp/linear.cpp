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

void linear(const LinearWeights& weights, Activation activation, const float* x, size_t n, float* y,
            const Machine& machine, const Lender& lender) {
  if (n == 0) return;
  const Kernels& kernels = machine.floats;
  const size_t threads = most_threads(), rows = weights.rows(), columns = weights.columns();
  const Tiles tiles(n, kernels.lanes, threads);
  const size_t parts = tiles.splits() ? weights.row_blocks() : 1;
  thread_local Buffer<float> kept;
  thread_local Buffer<int32_t> kept_rounded;
  const size_t words = weights.rounds() ? rounded_words(columns, machine.integers.words) : 0;  // of a column
  float* const in = kept.grow(tiles.columns() * (columns + rows));
  float* const out = in + tiles.columns() * columns;
  int32_t* const rounded = kept_rounded.grow(tiles.columns() * words);
  const auto input = [&](size_t t) {
    return LayerIn{in + tiles.offset(t, columns), rounded_tile(rounded + tiles.offset(t, words), columns, tiles[t].width)};
  };

  const Phase gather{tiles.count(), [&](size_t t, size_t) {
                       const float* from[kMostColumns];
                       float* const tile = in + tiles.offset(t, columns);
                       column_rows(tiles[t], x, n, columns, 0, from);
                       kernels.into_tile(from, tiles[t].width, columns, tile);
                       if (weights.rounds())
                         machine.integers.round(Activation::kNone, tile, columns, tiles[t].vectors, input(t).rounded,
                                                nullptr);
                     }};
  const Phase multiply{
      tiles.count() * parts, [&](size_t item, size_t) {
        const size_t t = item / parts, part = item % parts;
        const uint32_t b0 = uint32_t(parts == 1 ? 0 : part), b1 = parts == 1 ? weights.row_blocks() : b0 + 1;
        const uint32_t r0 = weights.first_row(b0), r1 = weights.first_row(b1);
        float* tile = out + tiles.offset(t, rows) + r0 * tiles[t].width;
        multiply_tile(weights, b0, b1, input(t), {tile, r0}, tiles[t].vectors, machine);
        kernels.activate(activation, tile, (r1 - r0) * tiles[t].width);
        float* to[kMostColumns];
        column_rows(tiles[t], y, n, rows, r0, to);
        kernels.out_of_tile(tile, tiles[t].width, r1 - r0, to);
      }};
  Team::run({gather, multiply}, lender, threads);
}

double product_seconds(const LinearWeights& weights, size_t tokens, size_t repeats, const Machine& machine) {
  using Clock = std::chrono::steady_clock;
  const Tiles tiles(tokens, machine.floats.lanes, 1);
  const size_t words = weights.rounds() ? rounded_words(weights.columns(), machine.integers.words) : 0;
  Buffer<float> x(tiles.columns() * weights.columns()), y(tiles.columns() * weights.rows());
  Buffer<int32_t> rounded(tiles.columns() * words);
  for (size_t i = 0; i < x.size(); i++) x[i] = float(i % 7);
  std::vector<LayerIn> inputs;
  for (size_t t = 0; t < tiles.count(); t++) {
    float* const tile = x.data() + tiles.offset(t, weights.columns());
    inputs.push_back({tile, rounded_tile(rounded.data() + tiles.offset(t, words), weights.columns(), tiles[t].width)});
    if (weights.rounds())
      machine.integers.round(Activation::kNone, tile, weights.columns(), tiles[t].vectors, inputs[t].rounded, nullptr);
  }
  const auto start = Clock::now();
  for (size_t repeat = 0; repeat < repeats; repeat++)
    for (uint32_t block = 0; block < weights.row_blocks(); block++)
      for (size_t t = 0; t < tiles.count(); t++)
        multiply_tile(weights, block, block + 1, inputs[t], {y.data() + tiles.offset(t, weights.rows()), 0},
                      tiles[t].vectors, machine);
  return std::chrono::duration<double>(Clock::now() - start).count() / double(repeats);
}

}  // namespace sparse_cpu
