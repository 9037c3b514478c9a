#include "encoder.hpp"

#include <algorithm>
#include <cmath>

#include "encoder_pass.hpp"

namespace sparse_cpu {

namespace {

// Reads parameters in order, and checks that their shapes agree.
class Reader {
 public:
  Reader(const Encoder::Next& next, const Machine& machine) : next_(next), machine_(machine) {}

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

  // `rows` 0: as many as there are.
  LinearWeights linear(const std::string& name, size_t rows, size_t columns, float scale = 1.0f) const {
    const Packed packed = next_(name + " weight");
    if (packed.columns != columns || (rows && packed.rows != rows))
      throw PackedError(packed.name + ": " + std::to_string(packed.rows) + " x " + std::to_string(packed.columns) +
                        " where " + (rows ? std::to_string(rows) : "?") + " x " + std::to_string(columns) +
                        " is needed");
    // The bias first: rows without a value take no bytes, so a damaged header could ask for memory for any number of them.
    const std::vector<float> bias = read_vector(next_(name + " bias"), packed.rows);
    return LinearWeights(packed, bias, machine_, scale);
  }

 private:
  const Encoder::Next& next_;
  const Machine& machine_;
};

}  // namespace

Encoder::Encoder(const EncoderShape& shape, const Machine& machine, const Next& next)
    : shape_(shape), machine_(machine), threads_(most_threads()) {
  const Reader read(next, machine);
  words_ = read.table("word embeddings");
  embedding_ = hidden_ = words_.columns;
  positions_ = read.table("position embeddings", embedding_);
  if (shape.token_types) types_ = read.table("token type embeddings", embedding_);
  embedding_norm_ = read.norm("embedding layer norm", embedding_);
  if (shape.projection) {
    projection_ = read.linear("embedding projection", 0, embedding_);
    hidden_ = projection_.rows();
  }
  if (shape.heads == 0 || hidden_ % shape.heads != 0)
    throw PackedError(std::to_string(shape.heads) + " heads do not divide a hidden width of " + std::to_string(hidden_));
  if (shape.padding_id < -1 || shape.padding_id >= int64_t(positions_.rows))
    throw PackedError("a padding id of " + std::to_string(shape.padding_id) + " is outside the table of positions");
  // A NaN would make every answer NaN; below zero, the root of a small variance is NaN.
  if (!std::isfinite(shape.epsilon) || shape.epsilon < 0)
    throw PackedError("an epsilon of " + std::to_string(shape.epsilon) + " is no small number above zero");
  if (shape.layers == 0) throw PackedError("an encoder without layers");
  head_size_ = hidden_ / shape.heads;
  const float scale = 1.0f / std::sqrt(float(head_size_));
  for (size_t l = 0; l < shape.layers; l++) {
    const std::string name = "layer " + std::to_string(l) + " ";
    EncoderLayer layer;
    layer.query = read.linear(name + "query", hidden_, hidden_, scale);
    layer.key = read.linear(name + "key", hidden_, hidden_);
    layer.value = read.linear(name + "value", hidden_, hidden_);
    layer.output = read.linear(name + "attention output", hidden_, hidden_);
    layer.attention_norm = read.norm(name + "attention layer norm", hidden_);
    layer.up = read.linear(name + "intermediate", inner_, hidden_);
    inner_ = layer.up.rows();
    layer.down = read.linear(name + "output", hidden_, inner_);
    layer.output_norm = read.norm(name + "output layer norm", hidden_);
    layers_.push_back(std::move(layer));
  }

  const auto each = [&](auto&& visit) {
    for (EncoderLayer& l : layers_)
      for (LinearWeights* matrix : {&l.query, &l.key, &l.value, &l.output, &l.up, &l.down}) visit(*matrix);
  };
  size_t bytes = 0;
  each([&](LinearWeights& matrix) { bytes += matrix.bytes(); });
  uint8_t* place = weights_.grow(bytes);
  each([&](LinearWeights& matrix) { place = matrix.move_to(place); });
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
