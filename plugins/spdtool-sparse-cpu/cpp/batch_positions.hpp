// What the positions of a batch's tokens add to its layers. Included only by encoder_pass.hpp.
#pragma once

#include "attention.hpp"
#include "encoder.hpp"
#include "layout.hpp"
#include "workspace.hpp"

namespace sparse_cpu {

class BatchPositions {
 public:
  BatchPositions(const Encoder& encoder, const Layout& layout, size_t length, EncoderWorkspace& work)
      : e_(encoder), layout_(layout), work_(work) {
    const size_t heads = e_.shape_.heads;
    switch (e_.shape_.kind) {
      case LayerKind::kBert: break;
      case LayerKind::kMpnet:
        work.bias.grow(length, heads, [&](size_t head, int64_t distance) {
          return e_.bucket_bias_[size_t(e_.buckets_.at(distance)) * heads + head];
        });
        break;
      case LayerKind::kDeberta:
        work.buckets.grow(length, 1, [&](size_t, int64_t distance) { return e_.buckets_.at(distance); });
        break;
      case LayerKind::kModernBert:
        for (const bool local : {false, true}) {
          tables_[local] = work.rotary[local].grow(length, e_.frequencies_[local]);
          angles_[local] = work.angles[local].grow(layout.tiles().columns() * e_.head_size_);
        }
    }
  }

  // What a layer adds to its scores.
  ScoreTerms terms(const EncoderLayer& layer) const {
    ScoreTerms terms;
    switch (e_.shape_.kind) {
      case LayerKind::kBert: break;
      case LayerKind::kMpnet: terms.bias = &work_.bias; break;
      case LayerKind::kDeberta:
        terms.buckets = &work_.buckets;
        terms.padding_sees = false;
        terms.position_keys = {&e_.position_tiles_, const_cast<float*>(layer.position_key.data()), e_.hidden_};
        terms.position_queries = {&e_.position_tiles_, const_cast<float*>(layer.position_query.data()), e_.hidden_};
        break;
      case LayerKind::kModernBert:
        if (e_.shape_.is_local(size_t(&layer - e_.layers_.data()))) terms.window = e_.shape_.window;
    }
    return terms;
  }

  // Lays out the angles of a tile's columns, for `rotate`.
  void lay_out_angles(size_t t) const {
    const Tiles::Tile& tile = layout_.tiles()[t];
    for (const bool local : {false, true}) {
      const float* rows[kWidestTile * 16] = {};
      for (size_t c = 0; c < tile.width && tile.column + c < layout_.columns(); c++)
        rows[c] = tables_[local] + size_t(layout_.position(tile.column + c)) * e_.head_size_;
      e_.machine_.floats.into_tile(rows, tile.width, e_.head_size_, angles(t, local));
    }
  }

  // Rotates tile t of a layer's keys, and of its queries, which may be null.
  void rotate(size_t t, size_t layer, float* keys, float* queries) const {
    const Tiles& tiles = layout_.tiles();
    const size_t half = e_.head_size_ / 2, offset = tiles.offset(t, e_.hidden_), width = tiles[t].width;
    const float* const cosine = angles(t, e_.shape_.is_local(layer));
    for (float* const x : {keys, queries})
      if (x != nullptr)
        e_.machine_.floats.rotate(x + offset, e_.shape_.heads, half, width, cosine, cosine + half * width);
  }

 private:
  // The cosines of a tile's columns, [half a head][width]; the sines follow.
  float* angles(size_t t, bool local) const { return angles_[local] + layout_.tiles().offset(t, e_.head_size_); }

  const Encoder& e_;
  const Layout& layout_;
  const EncoderWorkspace& work_;
  const float* tables_[2] = {};
  float* angles_[2] = {};
};

}  // namespace sparse_cpu
