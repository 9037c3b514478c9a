// A whole encoder of the BERT family: embeddings, then post-layer-norm layers.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.hpp"
#include "linear_weights.hpp"
#include "team.hpp"

namespace sparse_cpu {

// The input cannot be computed: an id outside its table, or a sequence that is too long.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct EncoderShape {
  size_t heads = 0, layers = 0;
  float epsilon = 1e-12f;
  Activation activation = Activation::kGelu;
  int64_t padding_id = -1;  // -1: positions count from 0; otherwise RoBERTa's rule
  bool token_types = false, projection = false;
  bool first_only = false;  // only the hidden state of token 0 is wanted
};

struct Tokens {
  const int64_t *ids, *mask, *types;  // [batch][length]; `types` may be null
  size_t batch, length;
};

struct LayerNorm {
  std::vector<float> gain, bias;
};

// One layer. The scale of the scores, 1 / sqrt(head size), is multiplied into the query's weights.
struct EncoderLayer {
  LinearWeights query, key, value, output, up, down;
  LayerNorm attention_norm, output_norm;

  bool rounds_input() const { return query.rounds() || key.rounds() || value.rounds(); }
};

struct EncoderWorkspace;

class Encoder {
 public:
  // Returns the next parameter in the order of the operator's inputs; the name is for errors.
  using Next = std::function<Packed(const std::string& name)>;

  // Reads every parameter. The embedding tables are not copied, and must outlive the encoder.
  // Throws PackedError: a parameter is damaged, or its shape does not fit the others.
  Encoder(const EncoderShape& shape, const Machine& machine, const Next& next);
  ~Encoder();

  size_t hidden() const { return hidden_; }
  bool first_only() const { return shape_.first_only; }

  // Hidden states [batch][length][hidden], or [batch][hidden] of token 0. Padding is computed only where it is asked for.
  // Safe to call from several threads at once. Throws InputError, std::bad_alloc.
  void run(const Tokens& tokens, float* out, const Lender& lender) const;

 private:
  friend class EncoderPass;

  void check(const Tokens& tokens) const;

  EncoderShape shape_;
  const Machine machine_;
  size_t embedding_ = 0, hidden_ = 0, head_size_ = 0, inner_ = 0;
  Packed words_{}, positions_{}, types_{};
  LayerNorm embedding_norm_;
  LinearWeights projection_;
  std::vector<EncoderLayer> layers_;
  Buffer<uint8_t> weights_;  // of all layers

  mutable std::atomic<size_t> threads_;  // of the session, as far as is known
  mutable std::atomic<bool> first_batch_{true};
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<EncoderWorkspace>> idle_;
};

}  // namespace sparse_cpu
