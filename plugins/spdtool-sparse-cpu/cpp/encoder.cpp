#include "encoder.hpp"

#include <algorithm>
#include <cmath>

#include "encoder_pass.hpp"

namespace sparse_cpu {

constexpr uint32_t kMostBuckets = 1u << 12;  // each is a column of two matrices for every layer

// Reads parameters in order, and checks that their shapes agree.
class EncoderReader {
 public:
  EncoderReader(const Encoder::Next& next, const Machine& machine) : next_(next), machine_(machine) {}

  Packed table(const std::string& name, size_t columns = 0) const {
    Packed packed = next_(name);
    check_table(packed, columns ? uint32_t(columns) : packed.columns);
    return packed;
  }

  LayerNorm norm(const std::string& name, size_t size) const {
    LayerNorm norm;
    norm.gain = read_vector(next_(name + " weight"), size);
    norm.bias = read_vector(next_(name + " bias"), size);
    return norm;
  }

  // `size` 0: as many as there are.
  std::vector<float> numbers(const std::string& name, size_t size = 0) const {
    const Packed packed = next_(name);
    return read_vector(packed, size ? size : packed.columns);
  }

  // `rows` 0: as many as there are.
  LinearWeights linear(const std::string& name, size_t rows, size_t columns, float scale = 1.0f) const {
    const auto [packed, bias] = matrix(name, rows, columns);
    return LinearWeights(packed, bias, machine_, scale);
  }

  // Matrices that one parameter holds, one above the other, with a scale for each.
  std::vector<LinearWeights> linears(const std::string& name, size_t rows, size_t columns,
                                     const std::vector<float>& scales) const {
    const auto [packed, bias] = matrix(name, rows * scales.size(), columns);
    if (packed.rows % scales.size() != 0)
      throw PackedError(packed.name + ": " + std::to_string(packed.rows) + " rows are not " +
                        std::to_string(scales.size()) + " matrices");
    return LinearWeights::split(packed, bias, machine_, scales);
  }

 private:
  std::pair<Packed, std::vector<float>> matrix(const std::string& name, size_t rows, size_t columns) const {
    const Packed packed = next_(name + " weight");
    if (packed.columns != columns || (rows && packed.rows != rows))
      throw PackedError(packed.name + ": " + std::to_string(packed.rows) + " x " + std::to_string(packed.columns) +
                        " where " + (rows ? std::to_string(rows) : "?") + " x " + std::to_string(columns) +
                        " is needed");
    // The bias first: rows without a value take no bytes, so a damaged header could ask for memory for any number of them.
    return {packed, read_vector(next_(name + " bias"), packed.rows)};
  }

  const Encoder::Next& next_;
  const Machine& machine_;
};

Encoder::Encoder(const EncoderShape& shape, const Machine& machine, const Next& next)
    : shape_(shape), machine_(machine), threads_(most_threads()) {
  const EncoderReader read(next, machine);
  // A NaN would make every answer NaN; below zero, the root of a small variance is NaN.
  if (!std::isfinite(shape.epsilon) || shape.epsilon < 0)
    throw PackedError("an epsilon of " + std::to_string(shape.epsilon) + " is no small number above zero");
  if (shape.layers == 0) throw PackedError("an encoder without layers");
  read_embeddings(read);
  read_relative_positions(read);
  for (size_t l = 0; l < shape.layers; l++) read_layer(read, l);
  if (shape.norms_first()) layers_.back().output_norm = read.norm("last layer norm", hidden_);

  const auto each = [&](auto&& visit) {
    for (EncoderLayer& l : layers_)
      for (LinearWeights* matrix : {&l.query, &l.key, &l.value, &l.output, &l.up, &l.gate, &l.down})
        if (matrix->rows() != 0) visit(*matrix);  // most kinds have no gate
  };
  size_t bytes = 0;
  each([&](LinearWeights& matrix) { bytes += matrix.bytes(); });
  uint8_t* place = weights_.grow(bytes);
  each([&](LinearWeights& matrix) { place = matrix.move_to(place); });
}

void Encoder::read_embeddings(const EncoderReader& read) {
  words_ = read.table("word embeddings");
  embedding_ = hidden_ = words_.columns;
  if (shape_.embeds_positions()) positions_ = read.table("position embeddings", embedding_);
  if (shape_.token_types) types_ = read.table("token type embeddings", embedding_);
  embedding_norm_ = read.norm("embedding layer norm", embedding_);
  if (shape_.projection) {
    projection_ = read.linear("embedding projection", 0, embedding_);
    hidden_ = projection_.rows();
  }
  if (shape_.heads == 0 || hidden_ % shape_.heads != 0)
    throw PackedError(std::to_string(shape_.heads) + " heads do not divide a hidden width of " + std::to_string(hidden_));
  head_size_ = hidden_ / shape_.heads;
  const int64_t most = shape_.embeds_positions() ? int64_t(positions_.rows) : 0;
  if (shape_.padding_id < -1 || shape_.padding_id >= std::max<int64_t>(most, 0))
    throw PackedError("a padding id of " + std::to_string(shape_.padding_id) + " is outside the table of positions");
}

void Encoder::read_relative_positions(const EncoderReader& read) {
  switch (shape_.kind) {
    case LayerKind::kBert: return;
    case LayerKind::kMpnet: {
      const Packed table = read.table("relative positions", shape_.heads);
      for (uint32_t row = 0; row < table.rows; row++) {
        std::vector<float> numbers(shape_.heads);
        add_row(machine_.floats, table, row, numbers.data());
        bucket_bias_.insert(bucket_bias_.end(), numbers.begin(), numbers.end());
      }
      buckets_ = DistanceBuckets(read.numbers("buckets of distances"), table.rows, false);
      return;
    }
    case LayerKind::kDeberta: {
      const Packed table = read.table("relative positions", hidden_);
      if (table.rows > kMostBuckets) throw PackedError(std::to_string(table.rows) + " relative positions");
      const LayerNorm norm = read.norm("relative position layer norm", hidden_);
      buckets_ = DistanceBuckets(read.numbers("buckets of distances"), table.rows, true);
      embed_buckets(table, norm);
      return;
    }
    case LayerKind::kModernBert:
      if (shape_.attention.size() != shape_.layers || shape_.attention.find_first_not_of("gl") != std::string::npos)
        throw PackedError("the attention of " + std::to_string(shape_.layers) + " layers is " + shape_.attention);
      if (shape_.window < 0) throw PackedError("a window of " + std::to_string(shape_.window));
      if (head_size_ % 2 != 0) throw PackedError("heads of " + std::to_string(head_size_) + " numbers cannot be rotated");
      for (auto& frequencies : frequencies_) frequencies = read.numbers("rotary frequencies", head_size_ / 2);
  }
}

void Encoder::read_layer(const EncoderReader& read, size_t index) {
  const std::string name = "layer " + std::to_string(index) + " ";
  EncoderLayer layer;
  if (shape_.kind == LayerKind::kModernBert) {
    const float scale = 1.0f / std::sqrt(float(head_size_));
    if (index > 0) layers_.back().output_norm = read.norm(name + "attention layer norm", hidden_);
    auto attention = read.linears(name + "query, key and value", hidden_, hidden_, {scale, 1.0f, 1.0f});
    layer.query = std::move(attention[0]);
    layer.key = std::move(attention[1]);
    layer.value = std::move(attention[2]);
    layer.output = read.linear(name + "attention output", hidden_, hidden_);
    layer.attention_norm = read.norm(name + "feed-forward layer norm", hidden_);
    auto inner = read.linears(name + "intermediate", inner_, hidden_, {1.0f, 1.0f});
    layer.up = std::move(inner[0]);
    layer.gate = std::move(inner[1]);
    inner_ = layer.up.rows();
    layer.down = read.linear(name + "output", hidden_, inner_);
  } else {
    // DeBERTa adds three scores.
    const float scale = 1.0f / std::sqrt(float(head_size_) * (shape_.kind == LayerKind::kDeberta ? 3.0f : 1.0f));
    layer.query = read.linear(name + "query", hidden_, hidden_, scale);
    layer.key = read.linear(name + "key", hidden_, hidden_);
    layer.value = read.linear(name + "value", hidden_, hidden_);
    layer.output = read.linear(name + "attention output", hidden_, hidden_);
    layer.attention_norm = read.norm(name + "attention layer norm", hidden_);
    layer.up = read.linear(name + "intermediate", inner_, hidden_);
    inner_ = layer.up.rows();
    layer.down = read.linear(name + "output", hidden_, inner_);
    layer.output_norm = read.norm(name + "output layer norm", hidden_);
    if (shape_.kind == LayerKind::kDeberta) project_buckets(layer);
  }
  layers_.push_back(std::move(layer));
}

// Lays out the embeddings of DeBERTa's buckets as columns of tiles, normalised.
void Encoder::embed_buckets(const Packed& table, const LayerNorm& norm) {
  const Kernels& k = machine_.floats;
  position_tiles_ = Tiles(table.rows, k.lanes, 1);
  embedded_buckets_.grow(position_tiles_.columns() * hidden_);
  for (size_t t = 0; t < position_tiles_.count(); t++) {
    const Tiles::Tile& tile = position_tiles_[t];
    std::vector<float> sums(tile.width * hidden_);
    const float* rows[kWidestTile * 16] = {};
    for (size_t c = 0; c < tile.width && tile.column + c < table.rows; c++) {
      add_row(k, table, int64_t(tile.column + c), &sums[c * hidden_]);
      rows[c] = &sums[c * hidden_];
    }
    float* const x = embedded_buckets_.data() + position_tiles_.offset(t, hidden_);
    k.into_tile(rows, tile.width, hidden_, x);
    k.add_layer_norm(x, nullptr, x, hidden_, tile.vectors, norm.gain.data(), norm.bias.data(), shape_.epsilon, nullptr);
  }
}

// Multiplies the buckets with a layer's matrices of queries and keys, as if they were tokens.
void Encoder::project_buckets(EncoderLayer& layer) const {
  const size_t size = position_tiles_.columns() * hidden_;
  layer.position_key.grow(size + 64);  // attention loads whole vectors
  layer.position_query.grow(size + 64);
  for (size_t t = 0; t < position_tiles_.count(); t++) {
    const Tiles::Tile& tile = position_tiles_[t];
    const size_t offset = position_tiles_.offset(t, hidden_);
    float* const x = const_cast<float*>(embedded_buckets_.data()) + offset;  // rounding without activation leaves it
    Buffer<int32_t> words;
    for (const bool is_key : {true, false}) {
      const LinearWeights& matrix = is_key ? layer.key : layer.query;
      LayerIn in{x, {}};
      if (matrix.rounds()) {
        in.rounded = rounded_tile(words.grow(tile.width * rounded_words(hidden_, machine_.integers.words)), hidden_, tile.width);
        machine_.integers.round(Activation::kNone, x, hidden_, tile.vectors, in.rounded, nullptr);
      }
      float* const y = (is_key ? layer.position_key : layer.position_query).data() + offset;
      multiply_tile(matrix, 0, matrix.row_blocks(), in, {y, 0}, tile.vectors, machine_);
    }
  }
}

Encoder::~Encoder() = default;

void Encoder::check(const Tokens& tokens) const {
  const auto refuse = [](const char* what, int64_t found, uint64_t size) {
    throw InputError(std::string(what) + " " + std::to_string(found) + " is outside the table of " +
                     std::to_string(size));
  };
  for (size_t i = 0; i < tokens.batch * tokens.length; i++) {
    if (tokens.ids[i] < 0 || tokens.ids[i] >= int64_t(words_.rows)) refuse("token id", tokens.ids[i], words_.rows);
    if (tokens.types && shape_.token_types && (tokens.types[i] < 0 || tokens.types[i] >= int64_t(types_.rows)))
      refuse("token type", tokens.types[i], types_.rows);
  }
  if (!shape_.embeds_positions()) return;  // any length
  const int64_t last = int64_t(tokens.length) + shape_.padding_id;  // RoBERTa counts from padding_id + 1
  if (last >= int64_t(positions_.rows))
    throw InputError("a sequence of " + std::to_string(tokens.length) + " tokens is longer than the model's " +
                     std::to_string(int64_t(positions_.rows) - 1 - shape_.padding_id) + " positions");
}

void Encoder::run(const Tokens& tokens, float* out, const Lender& lender) const {
  if (tokens.batch == 0 || tokens.length == 0) return;
  check(tokens);
  std::unique_ptr<EncoderWorkspace> work;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      work = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (!work) work = std::make_unique<EncoderWorkspace>();

  const size_t threads = threads_.load(std::memory_order_relaxed);
  EncoderPass pass(*this, tokens, out, *work, threads);
  const size_t joined = Team::run(pass.phases(), lender, work->scratch.size());
  // onnxruntime does not say how many threads it has; the number that joined the first batch decides how later ones are
  // split.
  threads_.store(first_batch_.exchange(false) ? joined : std::max(threads, joined), std::memory_order_relaxed);

  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(work));
}

}  // namespace sparse_cpu
