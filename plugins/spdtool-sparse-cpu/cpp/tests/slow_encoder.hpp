// A random encoder of each kind, random batches, and the same encoder slowly in double precision.
#pragma once

#include "encoder.hpp"

#include <tuple>

#include "machine.hpp"
#include "plain.hpp"

namespace slow {

using namespace sparse_cpu;
using namespace plain;
using check::Chance;

// A test case: the widths of an encoder, and how its weights are stored.
struct Config {
  const char* name;
  size_t hidden, heads, inner, layers;
  size_t embedding = 0;  // not 0: with a projection from this width
  bool token_types = true;
  int64_t padding_id = -1;
  Activation activation = Activation::kGelu;
  Values tables = Values::kFloat32, values = Values::kFloat32;
  double density = 0.2;
  size_t positions = 40;
  LayerKind kind = LayerKind::kBert;
  const char* attention = "";  // of ModernBERT
  int32_t window = 3;
  bool blocks = false;  // matrices in blocks of four inputs, multiplied in 8 bits
};

constexpr uint32_t kWords = 50, kTypes = 2;
constexpr uint32_t kBuckets = 9;
constexpr int64_t kDistances = 6;  // with a bucket of their own

// A model's parameters in the order of the operator, plain and packed.
struct Model {
  Model(const Config& config, uint64_t seed) : config(config) {
    Chance chance(seed);
    const uint32_t hidden = uint32_t(config.hidden), inner = uint32_t(config.inner);
    const uint32_t width = config.embedding ? uint32_t(config.embedding) : hidden;
    const auto table = [&](uint32_t rows) { add(random_matrix(chance, rows, width, config.tables, 0.9), 0); };
    const auto numbers = [&](size_t size, float middle) {
      add(vector_matrix(random_vector(chance, size, middle, 0.3f)), 0);
    };
    const auto norm = [&](size_t size) { numbers(size, 1.0f), numbers(size, 0.0f); };
    const auto linear = [&](uint32_t rows, uint32_t columns) {
      const float spread = 1.5f / std::sqrt(float(columns) * float(config.density) + 0.1f);
      if (config.blocks) {
        plain.push_back(random_blocks(chance, rows, columns, config.density, spread));
        packed.push_back(pack(plain.back(), 3, 4));
      } else {
        add(random_matrix(chance, rows, columns, config.values, config.density, spread), 1 + int(chance.below(8)));
      }
      numbers(rows, 0.0f);
    };
    table(kWords);
    if (shape().embeds_positions()) table(uint32_t(config.positions));
    if (config.token_types) table(kTypes);
    norm(width);
    if (config.embedding) linear(hidden, width);
    const bool is_mpnet = config.kind == LayerKind::kMpnet;
    if (is_mpnet) add(random_matrix(chance, kBuckets, uint32_t(config.heads), config.tables, 0.9), 0);
    if (config.kind == LayerKind::kDeberta) table(kBuckets), norm(hidden);
    if (is_mpnet || config.kind == LayerKind::kDeberta) {
      std::vector<float> buckets;
      for (int64_t d = -kDistances; d <= kDistances; d++)
        buckets.push_back(is_mpnet ? float((d + 60) * 7 % kBuckets) : float((d + kDistances) * (kBuckets - 1) / (2 * kDistances)));
      add(vector_matrix(buckets), 0);
    }
    if (config.kind == LayerKind::kModernBert) {
      for (int n = 0; n < 2; n++) numbers(config.hidden / config.heads / 2, 1.0f);
      for (size_t l = 0; l < config.layers; l++) {
        if (l > 0) norm(hidden);
        linear(3 * hidden, hidden);
        linear(hidden, hidden);
        norm(hidden);
        linear(2 * inner, hidden);
        linear(hidden, inner);
      }
      norm(hidden);
      return;
    }
    for (size_t l = 0; l < config.layers; l++) {
      for (int n = 0; n < 4; n++) linear(hidden, hidden);
      norm(hidden);
      linear(inner, hidden);
      linear(hidden, inner);
      norm(hidden);
    }
  }

  void add(const Matrix& matrix, int gap_bits) {
    plain.push_back(matrix);
    packed.push_back(pack(matrix, gap_bits));
  }

  EncoderShape shape(Reads reads = Reads::kEvery) const {
    EncoderShape shape;
    shape.heads = config.heads;
    shape.layers = config.layers;
    shape.epsilon = epsilon;
    shape.activation = config.activation;
    shape.padding_id = config.padding_id;
    shape.token_types = config.token_types;
    shape.projection = config.embedding != 0;
    shape.reads = reads;
    shape.kind = config.kind;
    shape.attention = config.attention;
    shape.window = config.window;
    return shape;
  }

  std::unique_ptr<Encoder> encoder(bool first_only) const { return encoder(first_only ? Reads::kFirst : Reads::kEvery); }

  std::unique_ptr<Encoder> encoder(Reads reads) const {
    size_t index = 0;
    return std::make_unique<Encoder>(shape(reads), best_machine(), [&](const std::string& name) {
      const Bytes& bytes = packed.at(index++);
      return open(bytes.data(), bytes.size(), name);
    });
  }

  Config config;
  float epsilon = 1e-5f;
  std::vector<Matrix> plain;
  std::vector<Bytes> packed;
};

struct Batch {
  size_t batch, length;
  std::vector<int64_t> ids, mask, types;

  Tokens tokens(bool with_types = true) const {
    return {ids.data(), mask.data(), with_types ? types.data() : nullptr, batch, length};
  }
};

enum class Mask { kFull, kRight, kLeft, kHoles, kNothing, kFirstHidden, kMixed };

inline Batch make_batch(Chance& chance, size_t batch, size_t length, Mask mask, int64_t padding_id) {
  Batch made{batch, length, {}, {}, {}};
  for (size_t b = 0; b < batch; b++) {
    const size_t real = 1 + chance.below(length);
    const Mask kind = mask == Mask::kMixed ? Mask(chance.below(6)) : mask;
    for (size_t s = 0; s < length; s++) {
      bool shown = true;
      if (kind == Mask::kRight) shown = s < real;
      if (kind == Mask::kLeft) shown = s >= length - real;
      if (kind == Mask::kHoles) shown = chance.below(3) != 0;
      if (kind == Mask::kNothing) shown = false;
      if (kind == Mask::kFirstHidden) shown = s != 0;
      int64_t id = int64_t(chance.below(kWords));
      if (padding_id >= 0) id = shown && id == padding_id ? id + 1 : shown ? id : padding_id;
      made.ids.push_back(id);
      made.mask.push_back(shown);
      made.types.push_back(int64_t(chance.below(kTypes)));
    }
  }
  return made;
}

// ---- the slow encoder: one row of the batch, tokens as rows of numbers

using Table = std::vector<std::vector<double>>;

class Slow {
 public:
  Slow(const Model& model, const Batch& batch, size_t row, bool types)
      : model_(model), ids_(&batch.ids[row * batch.length]), mask_(&batch.mask[row * batch.length]),
        types_(types ? &batch.types[row * batch.length] : nullptr), length_(batch.length) {}

  Table run() {
    const Config& c = model_.config;
    const Matrix& words = next();
    const Matrix* positions = model_.shape().embeds_positions() ? &next() : nullptr;
    const Matrix* types = c.token_types ? &next() : nullptr;
    Table x(length_, std::vector<double>(words.columns));
    int64_t count = 0;
    for (size_t s = 0; s < length_; s++) {
      count += ids_[s] != c.padding_id;
      const int64_t place = c.padding_id < 0            ? int64_t(s)
                            : ids_[s] == c.padding_id ? c.padding_id
                                                        : c.padding_id + count;
      for (size_t i = 0; i < x[s].size(); i++) {
        x[s][i] = double(words.at(size_t(ids_[s]), i));
        if (positions) x[s][i] += double(positions->at(size_t(place), i));
        if (types) x[s][i] += double(types->at(types_ ? size_t(types_[s]) : 0, i));
      }
    }
    norm(x);
    if (c.embedding) x = linear(x);
    if (c.kind == LayerKind::kDeberta)
      for (size_t s = 0; s < length_; s++)
        for (double& v : x[s]) v = mask_[s] ? v : 0;
    read_positions();
    for (layer_ = 0; layer_ < c.layers; layer_++) c.kind == LayerKind::kModernBert ? modern_layer(x) : layer(x);
    if (c.kind == LayerKind::kModernBert) norm(x);
    CHECK(at_ == model_.plain.size());
    return x;
  }

 private:
  void read_positions() {
    const Config& c = model_.config;
    if (c.kind == LayerKind::kMpnet) bias_ = &next();
    if (c.kind == LayerKind::kDeberta) {
      const Matrix& table = next();
      for (uint32_t b = 0; b < table.rows; b++) {
        embedded_.emplace_back();
        for (uint32_t i = 0; i < table.columns; i++) embedded_.back().push_back(table.at(b, i));
      }
      norm(embedded_);
    }
    if (c.kind == LayerKind::kMpnet || c.kind == LayerKind::kDeberta) buckets_ = &next();
    if (c.kind == LayerKind::kModernBert) frequencies_[0] = &next(), frequencies_[1] = &next();
  }

  void layer(Table& x) {
    const size_t matrices = at_;
    const Table query = linear(x), key = linear(x), value = linear(x);
    const size_t after = at_;
    Table bucket_queries, bucket_keys;
    if (model_.config.kind == LayerKind::kDeberta) {
      at_ = matrices;
      bucket_queries = linear(embedded_), bucket_keys = linear(embedded_);
      at_ = after;
    }
    add(x, linear(attention(query, key, value, bucket_queries, bucket_keys)));
    norm(x);
    Table inner = linear(x);
    for (auto& token : inner)
      for (double& v : token) v = activated(v);
    add(x, linear(inner));
    norm(x);
  }

  void modern_layer(Table& x) {
    Table normed = x;
    if (layer_ > 0) norm(normed);
    const Table all = linear(normed);
    const size_t hidden = model_.config.hidden;
    Table query = columns(all, 0, hidden), key = columns(all, hidden, hidden);
    rotate(query), rotate(key);
    add(x, linear(attention(query, key, columns(all, 2 * hidden, hidden), {}, {})));
    normed = x;
    norm(normed);
    const Table inner = linear(normed);
    const size_t width = inner[0].size() / 2;
    Table gated = columns(inner, 0, width);
    for (size_t s = 0; s < gated.size(); s++)
      for (size_t i = 0; i < width; i++) gated[s][i] = activated(gated[s][i]) * inner[s][width + i];
    add(x, linear(gated));
  }

  static Table columns(const Table& all, size_t first, size_t count) {
    Table some;
    for (const auto& row : all) some.emplace_back(row.begin() + ptrdiff_t(first), row.begin() + ptrdiff_t(first + count));
    return some;
  }

  bool is_local() const { return model_.config.attention[0] != 0 && model_.config.attention[layer_] == 'l'; }

  void rotate(Table& x) const {
    const size_t size = model_.config.hidden / model_.config.heads, half = size / 2;
    for (size_t s = 0; s < x.size(); s++)
      for (size_t h = 0; h < model_.config.heads; h++)
        for (size_t f = 0; f < half; f++) {
          const double angle = double(float(s) * frequencies_[is_local()]->at(0, f));
          double &a = x[s][h * size + f], &b = x[s][h * size + half + f];
          const double before = a;
          a = before * std::cos(angle) - b * std::sin(angle);
          b = b * std::cos(angle) + before * std::sin(angle);
        }
  }

  size_t bucket(size_t query, size_t key) const {
    const int64_t distance = std::clamp(int64_t(query) - int64_t(key), -kDistances, kDistances);
    return size_t(buckets_->at(0, size_t(distance + kDistances)));
  }

  bool sees(size_t query, size_t key) const {
    if (model_.config.kind == LayerKind::kDeberta && !mask_[query]) return false;
    const int64_t distance = int64_t(query) - int64_t(key);
    return mask_[key] && (!is_local() || std::abs(distance) <= model_.config.window);
  }

  const Matrix& next() { return model_.plain[at_++]; }

  double activated(double x) const {
    switch (model_.config.activation) {
      case Activation::kRelu: return x > 0 ? x : 0;
      case Activation::kGelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
      case Activation::kGeluTanh: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
      default: return x;
    }
  }

  // As spdtool/models/int8.py rounds the inputs of a product.
  static void round_token(std::vector<double>& token) {
    for (size_t begin = 0; begin < token.size(); begin += kInputsOfChunk) {
      const auto first = token.begin() + ptrdiff_t(begin), last = token.begin() + ptrdiff_t(std::min<size_t>(token.size(), begin + kInputsOfChunk));
      const double least = std::min(0.0, *std::min_element(first, last)), most = std::max(0.0, *std::max_element(first, last));
      const double scale = most > least ? (most - least) / 255 : 1, zero = std::nearbyint(-least / scale);
      for (auto x = first; x != last; ++x) *x = (std::clamp(std::nearbyint(*x / scale) + zero, 0.0, 255.0) - zero) * scale;
    }
  }

  // As `round_symmetric` there rounds a key.
  static void round_key(double* begin, double* end) {
    double largest = 0;
    for (const double* x = begin; x < end; x++) largest = std::max(largest, std::abs(*x));
    for (double* x = begin; x < end && largest > 0; x++) *x = std::nearbyint(*x * 127 / largest) * largest / 127;
  }

  bool rounds_attention() const {
    return model_.config.blocks && model_.config.kind == LayerKind::kBert && model_.config.hidden / model_.config.heads % 4 == 0;
  }

  // Rounds queries and keys token by token, and each column of the values over the keys that are seen.
  void round_heads(Table& query, Table& key, Table& value) const {
    const size_t size = model_.config.hidden / model_.config.heads;
    const bool blind = std::all_of(mask_, mask_ + length_, [](int64_t m) { return m == 0; });
    for (size_t s = 0; s < length_; s++)
      for (size_t first = 0; first < model_.config.hidden; first += size) {
        std::vector<double> head(query[s].begin() + ptrdiff_t(first), query[s].begin() + ptrdiff_t(first + size));
        round_token(head);
        std::copy(head.begin(), head.end(), query[s].begin() + ptrdiff_t(first));
        round_key(&key[s][first], &key[s][first] + size);
      }
    for (size_t d = 0; d < model_.config.hidden; d++) {
      std::vector<double> column;
      for (size_t s = 0; s < length_; s++) column.push_back(mask_[s] || blind ? value[s][d] : 0);
      round_key(column.data(), column.data() + length_);
      for (size_t s = 0; s < length_; s++) value[s][d] = column[s];
    }
  }

  Table linear(Table x) {
    if (model_.config.blocks)
      for (auto& token : x) round_token(token);
    const Matrix &weight = next(), &bias = next();
    Table y(x.size(), std::vector<double>(weight.rows));
    const std::vector<float> w = weight.all();
    for (size_t s = 0; s < x.size(); s++)
      for (size_t r = 0; r < weight.rows; r++) {
        double sum = bias.at(0, r);
        for (size_t c = 0; c < weight.columns; c++) sum += double(w[r * weight.columns + c]) * x[s][c];
        y[s][r] = sum;
      }
    return y;
  }

  static void add(Table& x, const Table& y) {
    for (size_t s = 0; s < x.size(); s++)
      for (size_t i = 0; i < x[s].size(); i++) x[s][i] += y[s][i];
  }

  void norm(Table& x) {
    const Matrix &gain = next(), &bias = next();
    for (auto& token : x) {
      double mean = 0, square = 0;
      for (const double v : token) mean += v / double(token.size());
      for (const double v : token) square += (v - mean) * (v - mean) / double(token.size());
      for (size_t i = 0; i < token.size(); i++)
        token[i] = (token[i] - mean) / std::sqrt(square + double(1e-5f)) * gain.at(0, i) + bias.at(0, i);
    }
  }

  Table attention(Table query, Table key, Table value, const Table& bucket_queries, const Table& bucket_keys) const {
    const Config& c = model_.config;
    if (rounds_attention()) round_heads(query, key, value);
    const size_t size = c.hidden / c.heads;
    const double scale = 1 / std::sqrt(double(size) * (c.kind == LayerKind::kDeberta ? 3 : 1));
    Table mixed(length_, std::vector<double>(c.hidden, 0.0));
    for (size_t h = 0; h < c.heads; h++)
      for (size_t q = 0; q < length_; q++) {
        bool blind = true;
        for (size_t k = 0; k < length_; k++) blind = blind && !sees(q, k);
        std::vector<double> score(length_, 0.0);
        double total = 0, most = -INFINITY;
        for (size_t k = 0; k < length_; k++) {
          if (!blind && !sees(q, k)) continue;
          for (size_t d = h * size; d < (h + 1) * size && !blind; d++) {
            score[k] += query[q][d] * key[k][d];
            if (c.kind != LayerKind::kDeberta) continue;
            score[k] += query[q][d] * bucket_keys[bucket(q, k)][d] + key[k][d] * bucket_queries[bucket(q, k)][d];
          }
          score[k] *= scale;
          if (c.kind == LayerKind::kMpnet && !blind) score[k] += double(bias_->at(bucket(q, k), h));
          most = std::max(most, score[k]);
        }
        for (size_t k = 0; k < length_; k++) {
          score[k] = blind || sees(q, k) ? std::exp(score[k] - most) : 0;
          if (rounds_attention()) score[k] = std::nearbyint(255 * score[k]);
          total += score[k];
        }
        for (size_t k = 0; k < length_; k++)
          for (size_t d = h * size; d < (h + 1) * size; d++) mixed[q][d] += score[k] / total * value[k][d];
      }
    return mixed;
  }

  const Model& model_;
  const int64_t *ids_, *mask_, *types_;
  const size_t length_;
  size_t at_ = 0, layer_ = 0;
  const Matrix *bias_ = nullptr, *buckets_ = nullptr, *frequencies_[2] = {};
  Table embedded_;  // of the buckets
};

// ---- comparing

inline std::vector<float> computed(const Encoder& encoder, const Batch& batch, Lender lender, bool types = true) {
  const size_t columns = encoder.shape().pools() ? batch.batch : batch.batch * batch.length;
  std::vector<float> out(columns * encoder.hidden(), -77.0f);
  encoder.run(batch.tokens(types), out.data(), lender);
  return out;
}

// What an encoder gives of the hidden states of one row.
inline std::vector<double> read_row(const Table& states, const int64_t* mask, Reads reads) {
  const size_t hidden = states[0].size(), length = states.size();
  if (reads == Reads::kFirst) return states[0];
  const bool blind = std::all_of(mask, mask + length, [](int64_t m) { return m == 0; });
  std::vector<double> all, mean(hidden, 0.0);
  for (size_t s = 0; s < length; s++) {
    const bool read = reads == Reads::kEvery || mask[s] || s == 0 || blind;
    for (size_t i = 0; i < hidden; i++) {
      mean[i] += mask[s] ? states[s][i] / double(std::count(mask, mask + length, 1)) : 0;
      all.push_back(read ? states[s][i] : 0.0);
    }
  }
  return reads == Reads::kMean ? mean : all;
}

// Compares some rows of the batch, at most `most`, with the slow encoder.
inline void compare(const Model& model, const Encoder& encoder, const Batch& batch, size_t most, bool types = true) {
  Threads one;
  const std::vector<float> found = computed(encoder, batch, one, types);
  const size_t width = encoder.hidden() * (encoder.shape().pools() ? 1 : batch.length);
  const size_t step = (batch.batch + most - 1) / most;
  for (size_t b = 0; b < batch.batch; b += step) {
    std::vector<double> expected = read_row(Slow(model, batch, b, types).run(), &batch.mask[b * batch.length],
                                            encoder.shape().reads);
    std::vector<float> row(&found[b * width], &found[b * width] + width);
    // Padding that real tokens stand before is computed only where token 0 reads it.
    for (size_t i = encoder.hidden(); encoder.shape().reads == Reads::kReal && i < width; i++)
      if (!batch.mask[b * batch.length + i / encoder.hidden()]) row[i] = 0, expected[i] = 0;
    // A value between two steps may be rounded to the other one.
    CHECK_CLOSE(row, expected, model.config.blocks ? 0.05 : 3e-5);
  }
}

}  // namespace slow
