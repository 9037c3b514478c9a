// The forward pass of one batch through an encoder. Included only by encoder.cpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "buffer.hpp"
#include "encoder.hpp"
#include "tiles.hpp"

namespace sparse_cpu {

constexpr size_t kRowBlocksOfChunk = 2;  // of the inner width of a feed-forward network, computed and used at a time
constexpr uint32_t kRowBlocksOfInt8Chunk = kInputsOfChunk / kRowsOfBlock;  // the same where they are rounded
static_assert(kInputsOfChunk % kRowsOfBlock == 0, "a chunk is made of row blocks of `up`");
static_assert(2 * kInputsOfChunk <= kTilesOfGroup * kRowBlocksOfChunk * kRowsOfBlock, "both forms of a chunk fit into the scratch");

// Buffers that outlive a batch, so that the next one allocates nothing.
struct EncoderWorkspace {
  Buffer<float> x, query, key, value, context, product, inner;
  Buffer<float> first_x, first_query, first_context, first_product, first_inner;
  Buffer<int32_t> rounded, rounded_inner, first_rounded, first_rounded_inner;
  Buffer<float> zeros;
  std::vector<Buffer<float>> scratch;  // of each thread
};

// Consecutive columns of one tile that belong to one sequence.
struct Stretch {
  size_t tile, offset;  // first column within the tile
  uint32_t count;
};

// Appends column `column` to `stretches`, joining it to the last one where they are neighbours in one tile.
inline void extend(std::vector<Stretch>& stretches, size_t begin, const Tiles& tiles, size_t column) {
  const size_t tile = tiles.find(column), offset = column - tiles[tile].column;
  if (stretches.size() > begin && stretches.back().tile == tile &&
      stretches.back().offset + stretches.back().count == offset) {
    stretches.back().count++;
  } else {
    stretches.push_back({tile, offset, 1});
  }
}

// The forward pass of one batch.
//
// Only real tokens are computed, and token 0 of each row whatever its mask, since heads read it. Their columns stand side
// by side without gaps, so that a tile may hold the end of one sequence and the beginning of the next.
class EncoderPass {
 public:
  EncoderPass(const Encoder& encoder, const Tokens& tokens, float* out, EncoderWorkspace& work, size_t threads)
      : e_(encoder), k_(encoder.machine_.floats), k8_(encoder.machine_.integers), tokens_(tokens), out_(out), work_(work),
        threads_(threads) {
    lay_out();
    all_ = {&tiles_, work.x.grow(size(tiles_, e_.hidden_)), work.query.grow(size(tiles_, e_.hidden_)),
            work.context.grow(size(tiles_, e_.hidden_)), work.product.grow(size(tiles_, e_.hidden_)),
            work.inner.grow(tiles_.splits() ? size(tiles_, e_.inner_) : 1),
            work.rounded.grow(rounded_size(tiles_, e_.hidden_)),
            work.rounded_inner.grow(tiles_.splits() ? rounded_size(tiles_, e_.inner_) : 1)};
    key_ = work.key.grow(size(tiles_, e_.hidden_));
    value_ = work.value.grow(size(tiles_, e_.hidden_));
    if (e_.first_only()) {
      first_tiles_ = Tiles(tokens.batch, k_.lanes, threads);
      first_ = {&first_tiles_, work.first_x.grow(size(first_tiles_, e_.hidden_)),
                work.first_query.grow(size(first_tiles_, e_.hidden_)),
                work.first_context.grow(size(first_tiles_, e_.hidden_)),
                work.first_product.grow(size(first_tiles_, e_.hidden_)),
                work.first_inner.grow(first_tiles_.splits() ? size(first_tiles_, e_.inner_) : 1),
                work.first_rounded.grow(rounded_size(first_tiles_, e_.hidden_)),
                work.first_rounded_inner.grow(first_tiles_.splits() ? rounded_size(first_tiles_, e_.inner_) : 1)};
    }
    zeros_ = work.zeros.grow(e_.head_size_ * widest());
    work.scratch.resize(most_threads());
    const size_t scores = (longest_ + 8) * widest();
    const size_t chunk = kTilesOfGroup * chunk_size();
    for (auto& scratch : work.scratch) scratch.grow(std::max({scores, chunk, 2 * e_.embedding_ * widest()}));
  }

  // Runs every step, in order.
  std::vector<Phase> phases() {
    std::vector<Phase> list;
    list.push_back({tiles_.count(), [this](size_t t, size_t worker) { embed(t, worker); }});
    for (const EncoderLayer& layer : e_.layers_) {
      const bool narrow = e_.first_only() && &layer == &e_.layers_.back();
      State& state = narrow ? first_ : all_;
      if (narrow) list.push_back({first_tiles_.count(), [this](size_t t, size_t) { take_first(t); }});
      if (narrow) add_products(list, {{&layer.query, first_.x, first_.rounded, first_.query}}, first_tiles_);
      std::vector<Product> products = {{&layer.key, all_.x, all_.rounded, key_},
                                       {&layer.value, all_.x, all_.rounded, value_}};
      if (!narrow) products.push_back({&layer.query, all_.x, all_.rounded, all_.query});
      add_products(list, products, tiles_);
      add_attention(list, state, narrow ? first_stretches_ : stretches_, narrow ? first_rows_ : rows_);
      state.tiles->splits() ? add_split_rest(list, layer, state) : add_rest(list, layer, state);
    }
    State& last = e_.first_only() ? first_ : all_;
    list.push_back({last.tiles->count(), [this, &last](size_t t, size_t) { write(t, last); }});
    return list;
  }

 private:
  // The activations of all columns, or of the first tokens only.
  struct State {
    const Tiles* tiles = nullptr;
    float *x = nullptr, *query = nullptr, *context = nullptr, *product = nullptr, *inner = nullptr;
    int32_t* rounded = nullptr;        // `x`, or `context` once it is computed, where a layer rounds it
    int32_t* rounded_inner = nullptr;  // `inner`
  };

  size_t widest() const { return kWidestTile * size_t(k_.lanes); }
  size_t chunk_size() const { return kRowBlocksOfChunk * kRowsOfBlock * widest(); }
  static size_t size(const Tiles& tiles, size_t rows) { return tiles.columns() * rows + 64; }
  size_t rounded_size(const Tiles& tiles, size_t rows) const { return tiles.columns() * rounded_words(rows, k8_.words); }

  // Tile t of rounded columns with `rows` rows.
  RoundedTile rounded_at(const Tiles& tiles, size_t t, int32_t* data, size_t rows) const {
    return rounded_tile(data + tiles.offset(t, rounded_words(rows, k8_.words)), rows, tiles[t].width);
  }

  LayerIn input(const Tiles& tiles, size_t t, const float* x, int32_t* rounded, size_t rows) const {
    return {x + tiles.offset(t, rows), rounded_at(tiles, t, rounded, rows)};
  }

  // Rounds tile t of `from`, which is `x` or `context`, where `wanted`.
  void round(bool wanted, const State& state, size_t t, float* from) const {
    const Tiles& tiles = *state.tiles;
    if (wanted)
      k8_.round(Activation::kNone, from + tiles.offset(t, e_.hidden_), e_.hidden_, tiles[t].vectors,
                rounded_at(tiles, t, state.rounded, e_.hidden_), nullptr);
  }

  // Whether the layer after this one rounds what it reads.
  bool next_rounds(const EncoderLayer& layer) const {
    return &layer != &e_.layers_.back() && (&layer + 1)->rounds_input();
  }

  // ---- layout

  void lay_out() {
    const size_t length = tokens_.length;
    std::vector<bool> is_key;
    for (size_t b = 0; b < tokens_.batch; b++) {
      const int64_t* mask = tokens_.mask + b * length;
      // A row without any real token: softmax over nothing but masked scores is uniform over all of them.
      const bool blind = std::all_of(mask, mask + length, [](int64_t m) { return m == 0; });
      blind_.push_back(blind);
      first_column_.push_back(columns_.size());
      for (size_t s = 0; s < length; s++) {
        if (mask[s] == 0 && !blind && e_.first_only() && s > 0) continue;
        columns_.push_back(b * length + s);
        is_key.push_back(mask[s] != 0 || blind);
      }
    }
    first_column_.push_back(columns_.size());
    tiles_ = Tiles(columns_.size(), k_.lanes, threads_);
    for (size_t b = 0; b < tokens_.batch; b++) {
      key_begin_.push_back(keys_.size());
      const size_t query_begin = stretches_.size();
      size_t count = 0;
      for (size_t c = first_column_[b]; c < first_column_[b + 1]; c++) {
        extend(stretches_, query_begin, tiles_, c);
        if (is_key[c]) extend(keys_, key_begin_.back(), tiles_, c);
        count += is_key[c];
      }
      rows_.resize(stretches_.size(), b);
      longest_ = std::max(longest_, count);
    }
    key_begin_.push_back(keys_.size());
    if (e_.first_only()) {
      const Tiles tiles(tokens_.batch, k_.lanes, threads_);
      for (size_t b = 0; b < tokens_.batch; b++) {
        extend(first_stretches_, first_stretches_.size(), tiles, b);
        first_rows_.push_back(b);
      }
    }
  }

  // ---- steps

  static void add_row(const Kernels& k, const Packed& table, int64_t row, float* sum) {
    const size_t columns = table.columns, first = size_t(row) * columns;
    switch (table.type) {
      case Values::kFloat32: return k.add_float(sum, table.values + 4 * first, columns);
      case Values::kFloat16: return k.add_half(sum, table.values + 2 * first, columns);
      case Values::kInt8: {
        float scale;
        std::memcpy(&scale, table.scales + 4 * row, 4);
        return k.add_int8(sum, table.values + first, columns, scale);
      }
    }
  }

  int64_t position(size_t token) const {
    const size_t s = token % tokens_.length;
    if (e_.shape_.padding_id < 0) return int64_t(s);
    const int64_t* ids = tokens_.ids + token - s;
    const auto real = [&](size_t i) { return ids[i] != e_.shape_.padding_id; };
    if (!real(s)) return e_.shape_.padding_id;
    int64_t count = 0;
    for (size_t i = 0; i <= s; i++) count += real(i);
    return e_.shape_.padding_id + count;
  }

  void embed(size_t t, size_t worker) {
    const auto& tile = tiles_[t];
    const size_t size = e_.embedding_;
    float* sums = work_.scratch[worker].data();
    const float* rows[kWidestTile * 16] = {};
    for (size_t c = 0; c < tile.width && tile.column + c < columns_.size(); c++) {
      const size_t token = columns_[tile.column + c];
      float* sum = sums + c * size;
      std::fill(sum, sum + size, 0.0f);
      add_row(k_, e_.words_, tokens_.ids[token], sum);
      add_row(k_, e_.positions_, position(token), sum);
      if (e_.shape_.token_types) add_row(k_, e_.types_, tokens_.types ? tokens_.types[token] : 0, sum);
      rows[c] = sum;
    }
    float* x = all_.x + tiles_.offset(t, e_.hidden_);
    float* embedded = e_.shape_.projection ? sums + size * widest() : x;
    k_.into_tile(rows, tile.width, size, embedded);
    k_.add_layer_norm(embedded, nullptr, size, tile.vectors, e_.embedding_norm_.gain.data(),
                      e_.embedding_norm_.bias.data(), e_.shape_.epsilon, nullptr);
    if (e_.shape_.projection) {
      LayerIn in{embedded, {}};
      if (e_.projection_.rounds()) {  // in place of the sums, which are larger
        in.rounded = rounded_tile(reinterpret_cast<int32_t*>(sums), size, tile.width);
        k8_.round(Activation::kNone, embedded, size, tile.vectors, in.rounded, nullptr);
      }
      multiply_tile(e_.projection_, 0, e_.projection_.row_blocks(), in, {x, 0}, tile.vectors, e_.machine_);
    }
    round(e_.layers_.front().rounds_input(), all_, t, all_.x);
  }

  // Copies token 0 of every row out of the columns of the batch.
  void take_first(size_t t) {
    const auto& tile = first_tiles_[t];
    float* to = first_.x + first_tiles_.offset(t, e_.hidden_);
    for (size_t c = 0; c < tile.width && tile.column + c < tokens_.batch; c++) {
      const size_t column = first_column_[tile.column + c], from_tile = tiles_.find(column);
      const auto& source = tiles_[from_tile];
      const float* from = all_.x + tiles_.offset(from_tile, e_.hidden_) + (column - source.column);
      for (size_t r = 0; r < e_.hidden_; r++) to[r * tile.width + c] = from[r * source.width];
    }
    round(e_.layers_.back().query.rounds(), first_, t, first_.x);
  }

  struct Product {
    const LinearWeights* matrix;
    const float* x;
    int32_t* rounded;  // x, where the matrix wants it so
    float* y;
  };

  // Multiplies some row blocks of a matrix with every tile of a group.
  void multiply(const Product& p, uint32_t begin, uint32_t end, const Tiles& tiles, Tiles::Group group) const {
    for (uint32_t block = begin; block < end; block++)
      for (size_t t = group.begin; t < group.end; t++)
        multiply_tile(*p.matrix, block, block + 1, input(tiles, t, p.x, p.rounded, p.matrix->columns()),
                      {p.y + tiles.offset(t, p.matrix->rows()), 0}, tiles[t].vectors, e_.machine_);
  }

  // Multiplies every column with matrices of one shape; a work item is a group of tiles, or a row block of one tile.
  void add_products(std::vector<Phase>& list, const std::vector<Product>& products, const Tiles& tiles) {
    if (!tiles.splits()) {
      list.push_back({tiles.groups().size(), [this, products, &tiles](size_t g, size_t) {
                        for (const Product& p : products)
                          multiply(p, 0, p.matrix->row_blocks(), tiles, tiles.groups()[g]);
                      }});
      return;
    }
    const size_t blocks = products.front().matrix->row_blocks(), parts = products.size() * blocks;
    list.push_back({tiles.count() * parts, [this, products, &tiles, blocks, parts](size_t item, size_t) {
                      const size_t t = item / parts;
                      const uint32_t block = uint32_t(item % parts % blocks);
                      const Product& p = products[item % parts / blocks];
                      multiply(p, block, block + 1, tiles, {t, t + 1});
                    }});
  }

  void add_attention(std::vector<Phase>& list, State& state, const std::vector<Stretch>& queries,
                     const std::vector<size_t>& rows) {
    const size_t heads = e_.shape_.heads;
    list.push_back({queries.size() * heads, [this, &state, &queries, &rows, heads](size_t item, size_t worker) {
                      attend(state, queries[item / heads], rows[item / heads], item % heads, worker);
                    }});
  }

  void attend(const State& state, const Stretch& query, size_t row, size_t head, size_t worker) {
    const size_t first = head * e_.head_size_;  // row of the tiles
    const auto place = [&](const Tiles& tiles, const Stretch& at, const float* data) {
      return data + tiles.offset(at.tile, e_.hidden_) + first * tiles[at.tile].width + at.offset;
    };
    std::vector<AttentionTask::Keys> keys;
    for (size_t s = key_begin_[row]; s < key_begin_[row + 1]; s++)
      keys.push_back({place(tiles_, keys_[s], key_), place(tiles_, keys_[s], value_), tiles_[keys_[s].tile].width,
                      keys_[s].count});
    const size_t width = (*state.tiles)[query.tile].width;
    AttentionTask task{};
    task.query = blind_[row] ? zeros_ : place(*state.tiles, query, state.query);
    task.query_width = width;
    task.context = const_cast<float*>(place(*state.tiles, query, state.context));
    task.context_width = width;
    task.queries = query.count;
    task.head_size = uint32_t(e_.head_size_);
    task.keys = keys.data();
    task.key_stretches = uint32_t(keys.size());
    task.scores = work_.scratch[worker].data();
    k_.attend(task);
  }

  // Adds `product` to x and normalises it; rounds it where `rounds`.
  void normalise(const State& state, size_t t, const LayerNorm& norm, bool rounds) const {
    const size_t offset = state.tiles->offset(t, e_.hidden_);
    const int vectors = (*state.tiles)[t].vectors;
    const RoundedTile out = rounded_at(*state.tiles, t, state.rounded, e_.hidden_);
    float* const range = rounds && e_.hidden_ <= kInputsOfChunk ? out.scale : nullptr;  // scale and zero follow one another
    k_.add_layer_norm(state.x + offset, state.product + offset, e_.hidden_, vectors, norm.gain.data(), norm.bias.data(),
                      e_.shape_.epsilon, range);
    if (rounds) k8_.round(Activation::kNone, state.x + offset, e_.hidden_, vectors, out, range);
  }

  // Computes everything after the attention, one group of tiles after the other.
  void add_rest(std::vector<Phase>& list, const EncoderLayer& layer, State& state) {
    list.push_back({state.tiles->groups().size(), [this, &layer, &state](size_t g, size_t worker) {
                      const Tiles::Group group = state.tiles->groups()[g];
                      for (size_t t = group.begin; t < group.end; t++)
                        round(layer.output.rounds(), state, t, state.context);
                      multiply({&layer.output, state.context, state.rounded, state.product}, 0,
                               layer.output.row_blocks(), *state.tiles, group);
                      for (size_t t = group.begin; t < group.end; t++) {
                        normalise(state, t, layer.attention_norm, layer.up.rounds());
                      }
                      float* const scratch = work_.scratch[worker].data();
                      layer.down.rounds() ? rounded_feed_forward(layer, state, group, scratch)
                                          : feed_forward(layer, state, group, scratch);
                      for (size_t t = group.begin; t < group.end; t++) {
                        normalise(state, t, layer.output_norm, next_rounds(layer));
                      }
                    }});
  }

  // The inner activations are computed in chunks that are used while they are in the cache.
  void feed_forward(const EncoderLayer& layer, State& state, Tiles::Group group, float* scratch) const {
    static_assert(kRowsOfBlock == kDepthOfBlock, "a chunk is made of row blocks of `up`, and of depth blocks of `down`");
    const Tiles& tiles = *state.tiles;
    const uint32_t blocks = layer.up.row_blocks();
    for (uint32_t begin = 0; begin < blocks; begin += kRowBlocksOfChunk) {
      const uint32_t end = std::min<uint32_t>(blocks, begin + kRowBlocksOfChunk), row = layer.up.first_row(begin);
      const auto inner = [&](size_t t) { return scratch + (t - group.begin) * chunk_size(); };
      for (uint32_t block = begin; block < end; block++)
        for (size_t t = group.begin; t < group.end; t++)
          multiply_tile(layer.up, block, block + 1, input(tiles, t, state.x, state.rounded, e_.hidden_), {inner(t), row},
                        tiles[t].vectors, e_.machine_);
      for (size_t t = group.begin; t < group.end; t++)
        k_.activate(e_.shape_.activation, inner(t), (layer.up.first_row(end) - row) * tiles[t].width);
      for (uint32_t block = 0; block < layer.down.row_blocks(); block++)
        for (size_t t = group.begin; t < group.end; t++)
          k_.multiply(layer.down.single().view(), layer.down.single().block(block) + begin,
                      layer.down.single().block(block) + end, {inner(t), row},
                      {state.product + tiles.offset(t, e_.hidden_), 0}, tiles[t].vectors);
    }
  }

  // The same where `down` rounds its inputs: a chunk is one whose columns share a scale. Its weights are few enough to stay
  // in the cache, so tiles come one after the other, and the inner activations of one tile at a time.
  void rounded_feed_forward(const EncoderLayer& layer, State& state, Tiles::Group group, float* inner) const {
    const Tiles& tiles = *state.tiles;
    const uint32_t blocks = layer.up.row_blocks();
    const Int8Matrix& down = layer.down.blocks();
    for (uint32_t begin = 0; begin < blocks; begin += kRowBlocksOfInt8Chunk) {
      const uint32_t end = std::min(blocks, begin + kRowBlocksOfInt8Chunk), row = layer.up.first_row(begin);
      const size_t rows = layer.up.first_row(end) - row;
      for (size_t t = group.begin; t < group.end; t++) {
        const auto& tile = tiles[t];
        const RoundedTile rounded =
            rounded_tile(reinterpret_cast<int32_t*>(inner + kInputsOfChunk * widest()), rows, tile.width);
        multiply_tile(layer.up, begin, end, input(tiles, t, state.x, state.rounded, e_.hidden_), {inner, row}, tile.vectors,
                      e_.machine_);
        k8_.round(e_.shape_.activation, inner, rows, tile.vectors, rounded, nullptr);
        for (uint32_t block = 0; block < down.row_blocks(); block++) {
          const size_t first = down.block(block) + begin / kRowBlocksOfInt8Chunk;
          k8_.multiply(down.view(), first, first + 1, rounded, row, {state.product + tiles.offset(t, e_.hidden_), 0},
                       tile.vectors);
        }
      }
    }
  }

  // The same with row blocks as work items, for a batch of fewer tiles than threads.
  void add_split_rest(std::vector<Phase>& list, const EncoderLayer& layer, State& state) {
    const Tiles& tiles = *state.tiles;
    if (layer.output.rounds())
      list.push_back({tiles.count(), [this, &state](size_t t, size_t) { round(true, state, t, state.context); }});
    add_products(list, {{&layer.output, state.context, state.rounded, state.product}}, tiles);
    list.push_back({tiles.count(), [this, &layer, &state](size_t t, size_t) {
                      normalise(state, t, layer.attention_norm, layer.up.rounds());
                    }});
    const size_t parts = layer.up.row_blocks();
    list.push_back({tiles.count() * parts, [this, &layer, &state, &tiles, parts](size_t item, size_t) {
                      const size_t t = item / parts;
                      const uint32_t block = uint32_t(item % parts), row = layer.up.first_row(block);
                      float* inner = state.inner + tiles.offset(t, e_.inner_) + row * tiles[t].width;
                      multiply_tile(layer.up, block, block + 1, input(tiles, t, state.x, state.rounded, e_.hidden_),
                                    {inner, row}, tiles[t].vectors, e_.machine_);
                      if (!layer.down.rounds())
                        k_.activate(e_.shape_.activation, inner, (layer.up.first_row(block + 1) - row) * tiles[t].width);
                    }});
    if (layer.down.rounds())
      list.push_back({tiles.count(), [this, &state, &tiles](size_t t, size_t) {
                        k8_.round(e_.shape_.activation, state.inner + tiles.offset(t, e_.inner_), e_.inner_,
                                  tiles[t].vectors, rounded_at(tiles, t, state.rounded_inner, e_.inner_), nullptr);
                      }});
    add_products(list, {{&layer.down, state.inner, state.rounded_inner, state.product}}, tiles);
    list.push_back({tiles.count(), [this, &layer, &state](size_t t, size_t) {
                      normalise(state, t, layer.output_norm, next_rounds(layer));
                    }});
  }

  void write(size_t t, const State& state) {
    const auto& tile = (*state.tiles)[t];
    float* rows[kWidestTile * 16] = {};
    const bool first = state.tiles == &first_tiles_;
    const size_t count = first ? tokens_.batch : columns_.size();
    for (size_t c = 0; c < tile.width && tile.column + c < count; c++) {
      const size_t column = tile.column + c;
      rows[c] = out_ + (first ? column : columns_[column]) * e_.hidden_;
    }
    k_.out_of_tile(state.x + state.tiles->offset(t, e_.hidden_), tile.width, e_.hidden_, rows);
  }

  const Encoder& e_;
  const Kernels& k_;
  const Int8Kernels& k8_;
  const Tokens& tokens_;
  float* const out_;
  EncoderWorkspace& work_;
  const size_t threads_;

  Tiles tiles_, first_tiles_;
  State all_, first_;
  float *key_ = nullptr, *value_ = nullptr;
  const float* zeros_ = nullptr;

  std::vector<size_t> columns_;       // column -> token of the batch
  std::vector<size_t> first_column_;  // row of the batch -> its first column
  std::vector<bool> blind_;           // rows without a real token
  std::vector<Stretch> stretches_, first_stretches_, keys_;
  std::vector<size_t> rows_, first_rows_;  // stretch -> row of the batch
  std::vector<size_t> key_begin_;          // row of the batch -> its first stretch of keys
  size_t longest_ = 0;                     // most keys of a row
};

}  // namespace sparse_cpu
