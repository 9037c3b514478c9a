// How the columns (tokens) of a batch are split into tiles.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace sparse_cpu {

constexpr size_t kTilesOfGroup = 4;

// Tiles of 1 to 4 vectors, of nearly equal width: a narrow one wastes more than an even cut.
class Tiles {
 public:
  struct Tile {
    size_t column;  // its first
    int vectors;
    size_t width;  // columns
  };

  // Neighbouring tiles that are multiplied together: a block of weights is used for all of them while it is in the cache.
  struct Group {
    size_t begin, end;
  };

  Tiles() = default;

  // For `columns` columns shared by `threads` threads: a multiple of the number of threads where tiles of two vectors or more
  // allow it; otherwise `splits()`, and the rows of a tile are shared instead.
  Tiles(size_t columns, int lanes, size_t threads) {
    const size_t vectors = (columns + lanes - 1) / lanes;
    size_t count = (vectors + kWidestTile - 1) / kWidestTile;
    const size_t even = (count + threads - 1) / threads * threads;
    if (vectors >= 2 * even) count = even;
    splits_ = count < threads;
    for (size_t t = 0, done = 0; t < count; t++) {
      const size_t upto = (t + 1) * vectors / count;
      tiles_.push_back({done * lanes, int(upto - done), (upto - done) * lanes});
      done = upto;
    }
    columns_ = vectors * lanes;
    const size_t groups = std::min(count, ((count + kTilesOfGroup - 1) / kTilesOfGroup + threads - 1) / threads * threads);
    for (size_t g = 0; g < groups; g++) groups_.push_back({g * count / groups, (g + 1) * count / groups});
  }

  size_t count() const { return tiles_.size(); }
  size_t columns() const { return columns_; }  // a whole number of vectors
  bool splits() const { return splits_; }
  const std::vector<Group>& groups() const { return groups_; }
  const Tile& operator[](size_t t) const { return tiles_[t]; }

  // Offset of tile t in a buffer with `rows` rows of every column.
  size_t offset(size_t t, size_t rows) const { return tiles_[t].column * rows; }

  // The tile of a column.
  size_t find(size_t column) const {
    return size_t(std::upper_bound(tiles_.begin(), tiles_.end(), column,
                                   [](size_t c, const Tile& tile) { return c < tile.column; }) -
                  tiles_.begin()) - 1;
  }

 private:
  std::vector<Tile> tiles_;
  std::vector<Group> groups_;
  size_t columns_ = 0;
  bool splits_ = false;
};

}  // namespace sparse_cpu
