// A whole encoder: embeddings, then layers of attention and feed-forward, of the kinds that LayerKind lists.
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
#include "positions.hpp"
#include "team.hpp"
#include "tiles.hpp"

namespace sparse_cpu {

// The input cannot be computed: an id outside its table, or a sequence that is too long.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class LayerKind {
  kBert,        // layer norm after each sum; positions are embedded
  kMpnet,       // the same, and each score gets a number for its head and the bucket of its distance
  kDeberta,     // layer norm after each sum; scores of content with the bucket of the distance; no embedded positions
  kModernBert,  // layer norm before attention and feed-forward, which has a gate; queries and keys are rotated
};

// Which hidden states a head reads.
enum class Reads {
  kFirst,  // that of token 0 alone: [batch][hidden]
  kMean,   // the mean over the real tokens of each row: [batch][hidden]; 0 where there are none
  kReal,   // those of real tokens and of token 0: [batch][length][hidden], zeros for padding
  kEvery,  // of padding too
};

struct EncoderShape {
  size_t heads = 0, layers = 0;
  float epsilon = 1e-12f;
  Activation activation = Activation::kGelu;
  int64_t padding_id = -1;  // -1: positions count from 0; otherwise RoBERTa's rule
  bool token_types = false, projection = false;
  LayerKind kind = LayerKind::kBert;
  Reads reads = Reads::kEvery;
  std::string attention;  // of ModernBERT, a letter for each layer: g (global), or l (local, within `window`)
  int32_t window = 0;     // largest distance

  bool embeds_positions() const { return kind == LayerKind::kBert || kind == LayerKind::kMpnet; }
  bool norms_first() const { return kind == LayerKind::kModernBert; }
  bool gated() const { return kind == LayerKind::kModernBert; }
  bool first_only() const { return reads == Reads::kFirst; }
  bool is_local(size_t layer) const { return !attention.empty() && attention[layer] == 'l'; }
  // Whether padding may see no token at all, not even those that are real. It attends to all alike then, as torch does.
  bool padding_reads_padding() const {
    return kind == LayerKind::kDeberta || attention.find('l') != std::string::npos;
  }
  bool pools() const { return reads == Reads::kFirst || reads == Reads::kMean; }
};

struct Tokens {
  const int64_t *ids, *mask, *types;  // [batch][length]; `types` may be null
  size_t batch, length;
};

struct LayerNorm {
  std::vector<float> gain, bias;
};

// One layer. The scale of the scores, such as 1 / sqrt(head size), is multiplied into the query's weights.
struct EncoderLayer {
  LinearWeights query, key, value, output, up, gate, down;
  LayerNorm attention_norm, output_norm;  // those that follow the two sums; of ModernBERT the second is the next layer's
  Buffer<float> position_key, position_query;  // of DeBERTa: every bucket as a column, in `position_tiles_`

  bool rounds_input() const { return query.rounds() || key.rounds() || value.rounds(); }
};

struct EncoderWorkspace;
class EncoderReader;

class Encoder {
 public:
  // Returns the next parameter in the order of the operator's inputs; the name is for errors.
  using Next = std::function<Packed(const std::string& name)>;

  // Reads every parameter. The embedding tables are not copied, and must outlive the encoder.
  // Throws PackedError: a parameter is damaged, or its shape does not fit the others.
  Encoder(const EncoderShape& shape, const Machine& machine, const Next& next);
  ~Encoder();

  size_t hidden() const { return hidden_; }
  const EncoderShape& shape() const { return shape_; }

  // Writes the hidden states of the last layer, as `Reads` says.
  // Safe to call from several threads at once. Throws InputError, std::bad_alloc.
  void run(const Tokens& tokens, float* out, const Lender& lender) const;

 private:
  friend class EncoderPass;
  friend class BatchPositions;

  void read_embeddings(const EncoderReader& read);
  void read_relative_positions(const EncoderReader& read);
  void read_layer(const EncoderReader& read, size_t layer);
  void embed_buckets(const Packed& table, const LayerNorm& norm);
  void project_buckets(EncoderLayer& layer) const;
  void check(const Tokens& tokens) const;

  EncoderShape shape_;
  const Machine machine_;
  size_t embedding_ = 0, hidden_ = 0, head_size_ = 0, inner_ = 0;
  Packed words_{}, positions_{}, types_{};
  LayerNorm embedding_norm_;
  LinearWeights projection_;
  DistanceBuckets buckets_;
  std::vector<float> bucket_bias_;     // of MPNet: [bucket][head]
  std::vector<float> frequencies_[2];  // of ModernBERT: rotary positions of global and of local layers
  Tiles position_tiles_;               // of DeBERTa: its buckets
  Buffer<float> embedded_buckets_;
  std::vector<EncoderLayer> layers_;
  Buffer<uint8_t> weights_;  // of all layers

  mutable std::atomic<size_t> threads_;  // of the session, as far as is known
  mutable std::atomic<bool> first_batch_{true};
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<EncoderWorkspace>> idle_;
};

}  // namespace sparse_cpu
