// The forward pass of one batch through an encoder. Included only by encoder.cpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention.hpp"
#include "batch_positions.hpp"
#include "buffer.hpp"
#include "encoder.hpp"
#include "layout.hpp"
#include "tiles.hpp"

namespace sparse_cpu {

constexpr size_t kRowBlocksOfChunk = 2;  // of the inner width of a feed-forward network, computed and used at a time
constexpr uint32_t kRowBlocksOfInt8Chunk = kInputsOfChunk / kRowsOfBlock;  // the same where they are rounded
static_assert(kInputsOfChunk % kRowsOfBlock == 0, "a chunk is made of row blocks of `up`");
static_assert(2 * kInputsOfChunk <= kTilesOfGroup * kRowBlocksOfChunk * kRowsOfBlock, "both forms of a chunk fit into the scratch");

// The forward pass of one batch.
class EncoderPass {
 public:
  EncoderPass(const Encoder& encoder, const Tokens& tokens, float* out, EncoderWorkspace& work, size_t threads)
      : e_(encoder), k_(encoder.machine_.floats), k8_(encoder.machine_.integers), tokens_(tokens), out_(out), work_(work),
        layout_(tokens, encoder.shape_, k_.lanes, threads), tiles_(layout_.tiles()), first_tiles_(layout_.first_tiles()),
        attention_(layout_, k_, encoder.head_size_, work.zeros.grow(encoder.head_size_ * widest())),
        rounded_keys_(layout_, tokens.batch, encoder.shape_.heads, encoder.head_size_, k8_),
        positions_(encoder, layout_, tokens.length, work) {
    all_ = state(tiles_, work.all);
    if (e_.shape_.first_only()) first_ = state(first_tiles_, work.first);
    key_ = work.key.grow(size(tiles_, e_.hidden_));
    value_ = work.value.grow(size(tiles_, e_.hidden_));
    work.scratch.resize(most_threads());
    if (std::any_of(e_.layers_.begin(), e_.layers_.end(), [this](const EncoderLayer& l) { return rounds_attention(l); }))
      work.rounded_keys.grow(rounded_keys_.words());
    const size_t scores = HeadAttention::scratch(layout_, e_.position_tiles_.columns(), widest(), e_.head_size_, k8_.words);
    const size_t chunk = kTilesOfGroup * (e_.shape_.gated() ? 2 : 1) * chunk_size();
    for (auto& scratch : work.scratch) scratch.grow(std::max({scores, chunk, 2 * e_.embedding_ * widest()}));
  }

  // Runs every step, in order.
  std::vector<Phase> phases() {
    std::vector<Phase> list;
    list.push_back({tiles_.count(), [this](size_t t, size_t worker) { embed(t, worker); }});
    for (const EncoderLayer& layer : e_.layers_) {
      const bool narrow = e_.shape_.first_only() && &layer == &e_.layers_.back();
      State& state = narrow ? first_ : all_;
      if (narrow) list.push_back({first_tiles_.count(), [this](size_t t, size_t) { take_first(t); }});
      if (narrow) add_products(list, {{&layer.query, first_.normed, first_.rounded, first_.query}}, first_tiles_);
      std::vector<Product> products = {{&layer.key, all_.normed, all_.rounded, key_},
                                       {&layer.value, all_.normed, all_.rounded, value_}};
      if (!narrow) products.push_back({&layer.query, all_.normed, all_.rounded, all_.query});
      add_products(list, products, tiles_);
      const size_t index = size_t(&layer - e_.layers_.data());
      if (e_.shape_.kind == LayerKind::kModernBert)  // token 0 stands at position 0, where no angle is
        list.push_back({tiles_.count(), [this, narrow, index](size_t t, size_t) {
                          positions_.rotate(t, index, key_, narrow ? nullptr : all_.query);
                        }});
      add_attention(list, layer, state, narrow ? layout_.first_queries() : layout_.queries());
      state.tiles->splits() ? add_split_rest(list, layer, state) : add_rest(list, layer, state);
    }
    State& last = e_.shape_.first_only() ? first_ : all_;
    if (e_.shape_.reads == Reads::kMean) {
      list.push_back({tokens_.batch, [this](size_t row, size_t) { write_mean(row); }});
    } else {
      list.push_back({last.tiles->count(), [this, &last](size_t t, size_t) { write(t, last); }});
      clear_padding();
    }
    return list;
  }

 private:
  // The activations of all columns, or of the first tokens only.
  struct State {
    const Tiles* tiles = nullptr;
    float* x = nullptr;       // the sum of everything so far, normalised where layer norm follows each sum
    float* normed = nullptr;  // what products read: `x` itself, or `x` normalised
    float *query = nullptr, *context = nullptr, *product = nullptr, *inner = nullptr;
    int32_t* rounded = nullptr;        // `normed`, or `context` once it is computed, where a layer rounds it
    int32_t* rounded_inner = nullptr;  // `inner`
  };

  State state(const Tiles& tiles, EncoderWorkspace::Activations& work) const {
    const size_t hidden = size(tiles, e_.hidden_), inner = (e_.shape_.gated() ? 2 : 1) * size(tiles, e_.inner_);
    float* const x = work.x.grow(hidden);
    return {&tiles, x, e_.shape_.norms_first() ? work.normed.grow(hidden) : x, work.query.grow(hidden),
            work.context.grow(hidden), work.product.grow(hidden), work.inner.grow(tiles.splits() ? inner : 1),
            work.rounded.grow(rounded_size(tiles, e_.hidden_)),
            work.rounded_inner.grow(tiles.splits() ? rounded_size(tiles, e_.inner_) : 1)};
  }

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

  // Whether a layer computes its attention in 8 bits: where nothing is added to the scores, and its products round.
  bool rounds_attention(const EncoderLayer& layer) const {
    return e_.shape_.kind == LayerKind::kBert && layer.query.rounds() && layer.key.rounds() && layer.value.rounds() &&
           e_.head_size_ % kInputsOfGroup == 0 && e_.head_size_ <= kMostRoundedInputs &&
           layout_.longest() <= kMostRoundedKeys;
  }

  // Whether the layer after this one rounds what it reads.
  bool next_rounds(const EncoderLayer& layer) const {
    return &layer != &e_.layers_.back() && (&layer + 1)->rounds_input();
  }

  // ---- steps

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
    for (size_t c = 0; c < tile.width && tile.column + c < layout_.columns(); c++) {
      const size_t token = layout_.token(tile.column + c);
      float* sum = sums + c * size;
      std::fill(sum, sum + size, 0.0f);
      add_row(k_, e_.words_, tokens_.ids[token], sum);
      if (e_.shape_.embeds_positions()) add_row(k_, e_.positions_, position(token), sum);
      if (e_.shape_.token_types) add_row(k_, e_.types_, tokens_.types ? tokens_.types[token] : 0, sum);
      rows[c] = sum;
    }
    float* x = all_.x + tiles_.offset(t, e_.hidden_);
    float* embedded = e_.shape_.projection ? sums + size * widest() : x;
    k_.into_tile(rows, tile.width, size, embedded);
    k_.add_layer_norm(embedded, nullptr, embedded, size, tile.vectors, e_.embedding_norm_.gain.data(),
                      e_.embedding_norm_.bias.data(), e_.shape_.epsilon, nullptr);
    if (e_.shape_.projection) {
      LayerIn in{embedded, {}};
      if (e_.projection_.rounds()) {  // in place of the sums, which are larger
        in.rounded = rounded_tile(reinterpret_cast<int32_t*>(sums), size, tile.width);
        k8_.round(Activation::kNone, embedded, size, tile.vectors, in.rounded, nullptr);
      }
      multiply_tile(e_.projection_, 0, e_.projection_.row_blocks(), in, {x, 0}, tile.vectors, e_.machine_);
    }
    if (e_.shape_.kind == LayerKind::kDeberta)
      for (size_t c = 0; c < tile.width && tile.column + c < layout_.columns(); c++)
        for (size_t r = 0; !layout_.is_real(tile.column + c) && r < e_.hidden_; r++) x[r * tile.width + c] = 0.0f;
    if (e_.shape_.norms_first()) {  // whose first layer has no norm before the attention
      const size_t offset = tiles_.offset(t, e_.hidden_);
      std::copy(x, x + e_.hidden_ * tile.width, all_.normed + offset);
    }
    if (e_.shape_.kind == LayerKind::kModernBert) positions_.lay_out_angles(t);
    round(e_.layers_.front().rounds_input(), all_, t, all_.normed);
  }

  // Copies token 0 of every row out of the columns of the batch.
  void take_first(size_t t) {
    const auto& tile = first_tiles_[t];
    for (size_t c = 0; c < tile.width && tile.column + c < tokens_.batch; c++) {
      const size_t column = layout_.first_column(tile.column + c), from_tile = tiles_.find(column);
      const auto& source = tiles_[from_tile];
      const size_t from = tiles_.offset(from_tile, e_.hidden_) + (column - source.column);
      const size_t to = first_tiles_.offset(t, e_.hidden_) + c;
      for (size_t r = 0; r < e_.hidden_; r++) {
        first_.x[to + r * tile.width] = all_.x[from + r * source.width];
        first_.normed[to + r * tile.width] = all_.normed[from + r * source.width];
      }
    }
    round(e_.layers_.back().query.rounds(), first_, t, first_.normed);
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

  void add_attention(std::vector<Phase>& list, const EncoderLayer& layer, const State& state,
                     const std::vector<Stretch>& queries) {
    const size_t heads = e_.shape_.heads;
    const Columns all_queries{state.tiles, state.query, e_.hidden_}, contexts{state.tiles, state.context, e_.hidden_};
    const Columns keys{&tiles_, key_, e_.hidden_}, values{&tiles_, value_, e_.hidden_};
    if (rounds_attention(layer)) {
      const auto rounded = [this, heads](size_t row, size_t head) {
        return rounded_keys_.at(work_.rounded_keys.data(), row, head);
      };
      list.push_back({tokens_.batch * heads, [this, heads, keys, values, rounded](size_t item, size_t) {
                        const size_t row = item / heads, head = item % heads;
                        attention_.round_keys(row, head, keys, values, k8_, rounded(row, head));
                      }});
      list.push_back({queries.size() * heads,
                      [this, &queries, heads, all_queries, contexts, rounded](size_t item, size_t worker) {
                        const Stretch& query = queries[item / heads];
                        attention_.attend_rounded(query, item % heads, all_queries, rounded(query.row, item % heads),
                                                  contexts, k8_, work_.scratch[worker].data());
                      }});
      return;
    }
    list.push_back({queries.size() * heads,
                    [this, &layer, &queries, heads, all_queries, keys, values, contexts](size_t item, size_t worker) {
                      attention_.attend(queries[item / heads], item % heads, all_queries, keys, values, contexts,
                                        positions_.terms(layer), work_.scratch[worker].data());
                    }});
  }

  // Adds `product` to x, and normalises the sum; rounds it where `rounds`.
  void normalise(const State& state, size_t t, const LayerNorm& norm, bool rounds) const {
    const size_t offset = state.tiles->offset(t, e_.hidden_);
    const int vectors = (*state.tiles)[t].vectors;
    const RoundedTile out = rounded_at(*state.tiles, t, state.rounded, e_.hidden_);
    float* const range = rounds && e_.hidden_ <= kInputsOfChunk ? out.scale : nullptr;  // scale and zero follow one another
    k_.add_layer_norm(state.x + offset, state.product + offset, state.normed + offset, e_.hidden_, vectors,
                      norm.gain.data(), norm.bias.data(), e_.shape_.epsilon, range);
    if (rounds) k8_.round(Activation::kNone, state.normed + offset, e_.hidden_, vectors, out, range);
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

  // Applies the activation to inner activations, and the gate, which is read where there is one.
  void activate(float* inner, const float* gate, size_t size) const {
    k_.activate(e_.shape_.activation, inner, size);
    if (e_.shape_.gated()) k_.scale_by(inner, gate, size);
  }

  // The activation that is left for rounding: a gate comes behind it.
  Activation late_activation() const { return e_.shape_.gated() ? Activation::kNone : e_.shape_.activation; }

  // The inner activations are computed in chunks that are used while they are in the cache.
  void feed_forward(const EncoderLayer& layer, State& state, Tiles::Group group, float* scratch) const {
    static_assert(kRowsOfBlock == kDepthOfBlock, "a chunk is made of row blocks of `up`, and of depth blocks of `down`");
    const Tiles& tiles = *state.tiles;
    const uint32_t blocks = layer.up.row_blocks();
    for (uint32_t begin = 0; begin < blocks; begin += kRowBlocksOfChunk) {
      const uint32_t end = std::min<uint32_t>(blocks, begin + kRowBlocksOfChunk), row = layer.up.first_row(begin);
      const auto inner = [&](size_t t) { return scratch + (t - group.begin) * chunk_size(); };
      const auto gate = [&](size_t t) { return inner(t) + kTilesOfGroup * chunk_size(); };
      for (uint32_t block = begin; block < end; block++)
        for (size_t t = group.begin; t < group.end; t++)
          multiply_tile(layer.up, block, block + 1, input(tiles, t, state.normed, state.rounded, e_.hidden_), {inner(t), row},
                        tiles[t].vectors, e_.machine_);
      for (uint32_t block = begin; e_.shape_.gated() && block < end; block++)
        for (size_t t = group.begin; t < group.end; t++)
          multiply_tile(layer.gate, block, block + 1, input(tiles, t, state.normed, state.rounded, e_.hidden_), {gate(t), row},
                        tiles[t].vectors, e_.machine_);
      for (size_t t = group.begin; t < group.end; t++)
        activate(inner(t), gate(t), (layer.up.first_row(end) - row) * tiles[t].width);
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
        multiply_tile(layer.up, begin, end, input(tiles, t, state.normed, state.rounded, e_.hidden_), {inner, row}, tile.vectors,
                      e_.machine_);
        if (e_.shape_.gated()) {
          float* const gate = inner + 2 * kInputsOfChunk * widest();
          multiply_tile(layer.gate, begin, end, input(tiles, t, state.normed, state.rounded, e_.hidden_), {gate, row},
                        tile.vectors, e_.machine_);
          activate(inner, gate, rows * tile.width);
        }
        k8_.round(late_activation(), inner, rows, tile.vectors, rounded, nullptr);
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
                      multiply_tile(layer.up, block, block + 1, input(tiles, t, state.normed, state.rounded, e_.hidden_),
                                    {inner, row}, tiles[t].vectors, e_.machine_);
                      float* const gate = inner + size(tiles, e_.inner_);
                      if (e_.shape_.gated())
                        multiply_tile(layer.gate, block, block + 1,
                                      input(tiles, t, state.normed, state.rounded, e_.hidden_), {gate, row},
                                      tiles[t].vectors, e_.machine_);
                      if (e_.shape_.gated() || !layer.down.rounds())
                        activate(inner, gate, (layer.up.first_row(block + 1) - row) * tiles[t].width);
                    }});
    if (layer.down.rounds())
      list.push_back({tiles.count(), [this, &state, &tiles](size_t t, size_t) {
                        k8_.round(late_activation(), state.inner + tiles.offset(t, e_.inner_), e_.inner_,
                                  tiles[t].vectors, rounded_at(tiles, t, state.rounded_inner, e_.inner_), nullptr);
                      }});
    add_products(list, {{&layer.down, state.inner, state.rounded_inner, state.product}}, tiles);
    list.push_back({tiles.count(), [this, &layer, &state](size_t t, size_t) {
                      normalise(state, t, layer.output_norm, next_rounds(layer));
                    }});
  }

  void write(size_t t, const State& state) const {
    const auto& tile = (*state.tiles)[t];
    float* rows[kWidestTile * 16] = {};
    const bool first = state.tiles == &first_tiles_;
    const size_t count = first ? tokens_.batch : layout_.columns();
    for (size_t c = 0; c < tile.width && tile.column + c < count; c++) {
      const size_t column = tile.column + c;
      rows[c] = out_ + (first ? column : layout_.token(column)) * e_.hidden_;
    }
    k_.out_of_tile(state.normed + state.tiles->offset(t, e_.hidden_), tile.width, e_.hidden_, rows);
  }

  // Writes zeros for the tokens that are not computed.
  void clear_padding() const {
    if (e_.shape_.reads != Reads::kReal) return;
    size_t token = 0;
    const auto clear_to = [&](size_t end) { std::fill(out_ + token * e_.hidden_, out_ + end * e_.hidden_, 0.0f); };
    for (size_t column = 0; column < layout_.columns(); column++, token++) {
      const size_t next = layout_.token(column);
      clear_to(next);
      token = next;
    }
    clear_to(tokens_.batch * tokens_.length);
  }

  void write_mean(size_t row) const {
    std::vector<double> sums(e_.hidden_);
    size_t count = 0;
    for (const Stretch* s = layout_.keys_begin(row); s < layout_.keys_end(row); s++, count += s[-1].count)
      for (size_t r = 0; r < e_.hidden_; r++) {
        const float* const from = all_.normed + tiles_.offset(s->tile, e_.hidden_) + r * tiles_[s->tile].width + s->offset;
        for (uint32_t c = 0; c < s->count; c++) sums[r] += from[c];
      }
    for (size_t r = 0; r < e_.hidden_; r++)
      out_[row * e_.hidden_ + r] = count == 0 ? 0.0f : float(sums[r] / double(count));
  }

  const Encoder& e_;
  const Kernels& k_;
  const Int8Kernels& k8_;
  const Tokens& tokens_;
  float* const out_;
  EncoderWorkspace& work_;
  const Layout layout_;
  const Tiles &tiles_, &first_tiles_;  // of the layout
  const HeadAttention attention_;
  const RoundedKeysLayout rounded_keys_;
  const BatchPositions positions_;
  State all_, first_;
  float *key_ = nullptr, *value_ = nullptr;
};

}  // namespace sparse_cpu
