// Which tokens of a batch are computed, in which columns they stand, and who attends to whom.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "encoder.hpp"
#include "tiles.hpp"

namespace sparse_cpu {

// Consecutive columns of one tile that belong to one sequence.
struct Stretch {
  size_t tile, offset;  // first column within the tile
  uint32_t count;
  size_t row;    // of the batch
  size_t first;  // of keys: index of the first one's position
};

// Padding is not computed unless it is read. Token 0 of each row is, whatever its mask, where heads read it. Columns
// stand side by side without gaps, so that a tile may hold the end of one sequence and the beginning of the next.
class Layout {
 public:
  Layout(const Tokens& tokens, const EncoderShape& shape, int lanes, size_t threads) {
    const Reads reads = shape.reads;
    std::vector<bool> is_key;
    for (size_t row = 0; row < tokens.batch; row++) {
      const int64_t* const mask = tokens.mask + row * tokens.length;
      // A row without any real token: softmax over nothing but masked scores is uniform over all of them.
      const bool blind = std::all_of(mask, mask + tokens.length, [](int64_t m) { return m == 0; });
      blind_.push_back(blind);
      first_column_.push_back(tokens_.size());
      for (size_t position = 0; position < tokens.length; position++) {
        const bool is_real = mask[position] != 0;
        const bool reads_row = blind || (mask[0] == 0 && shape.padding_reads_padding());
        if (!is_computed(reads, is_real, reads_row, position)) continue;
        tokens_.push_back(row * tokens.length + position);
        positions_.push_back(int32_t(position));
        real_.push_back(is_real);
        is_key.push_back(is_real || blind);
      }
    }
    first_column_.push_back(tokens_.size());
    tiles_ = Tiles(tokens_.size(), lanes, threads);
    for (size_t row = 0; row < tokens.batch; row++) add_row(row, is_key);
    query_begin_.push_back(queries_.size());
    key_begin_.push_back(keys_.size());
    key_first_.push_back(key_positions_.size());
    if (reads != Reads::kFirst) return;
    first_tiles_ = Tiles(tokens.batch, lanes, threads);
    for (size_t row = 0; row < tokens.batch; row++) extend(first_queries_, first_queries_.size(), first_tiles_, row, row, 0);
  }

  const Tiles& tiles() const { return tiles_; }              // of all tokens that are computed
  const Tiles& first_tiles() const { return first_tiles_; }  // of token 0 of each row, where nothing else is read
  size_t columns() const { return tokens_.size(); }
  size_t token(size_t column) const { return tokens_[column]; }  // of the batch
  int32_t position(size_t column) const { return positions_[column]; }
  bool is_real(size_t column) const { return real_[column]; }
  size_t first_column(size_t row) const { return first_column_[row]; }
  bool blind(size_t row) const { return blind_[row]; }  // without a real token
  size_t longest() const { return longest_; }           // most columns of a row

  const std::vector<Stretch>& queries() const { return queries_; }
  const std::vector<Stretch>& first_queries() const { return first_queries_; }

  // The stretches of all columns of a row.
  const Stretch* queries_begin(size_t row) const { return queries_.data() + query_begin_[row]; }
  const Stretch* queries_end(size_t row) const { return queries_.data() + query_begin_[row + 1]; }

  // The stretches of a row's keys, and the positions of these one after the other.
  const Stretch* keys_begin(size_t row) const { return keys_.data() + key_begin_[row]; }
  const Stretch* keys_end(size_t row) const { return keys_.data() + key_begin_[row + 1]; }
  const int32_t* key_positions() const { return key_positions_.data(); }
  size_t first_key(size_t row) const { return key_first_[row]; }

 private:
  // `reads_row`: token 0 is padding, and reads every other token, padding too.
  static bool is_computed(Reads reads, bool is_real, bool reads_row, size_t position) {
    if (reads == Reads::kEvery || is_real) return true;
    return reads != Reads::kMean && (reads_row || position == 0);
  }

  void add_row(size_t row, const std::vector<bool>& is_key) {
    key_begin_.push_back(keys_.size());
    key_first_.push_back(key_positions_.size());
    query_begin_.push_back(queries_.size());
    for (size_t column = first_column_[row]; column < first_column_[row + 1]; column++) {
      extend(queries_, query_begin_.back(), tiles_, column, row, 0);
      if (!is_key[column]) continue;
      extend(keys_, key_begin_.back(), tiles_, column, row, key_positions_.size());
      key_positions_.push_back(positions_[column]);
    }
    longest_ = std::max(longest_, first_column_[row + 1] - first_column_[row]);
  }

  // Appends a column, joining it to the last stretch where they are neighbours in one tile.
  static void extend(std::vector<Stretch>& stretches, size_t begin, const Tiles& tiles, size_t column, size_t row,
                     size_t first) {
    const size_t tile = tiles.find(column), offset = column - tiles[tile].column;
    if (stretches.size() > begin && stretches.back().tile == tile &&
        stretches.back().offset + stretches.back().count == offset) {
      stretches.back().count++;
    } else {
      stretches.push_back({tile, offset, 1, row, first});
    }
  }

  Tiles tiles_, first_tiles_;
  std::vector<size_t> tokens_;       // of each column
  std::vector<int32_t> positions_;   // of each column, within its row
  std::vector<size_t> first_column_;  // of each row
  std::vector<bool> real_;   // of each column
  std::vector<bool> blind_;  // of each row
  std::vector<Stretch> queries_, first_queries_, keys_;
  std::vector<size_t> query_begin_, key_begin_, key_first_;  // of each row: its first stretches, its first key's position
  std::vector<int32_t> key_positions_;
  size_t longest_ = 0;
};

}  // namespace sparse_cpu
