// Attention of some queries in one head, with what the kind of layer adds to the scores. Included only by encoder_pass.hpp.
#pragma once

#include <algorithm>
#include <vector>

#include "int8.hpp"
#include "layout.hpp"

namespace sparse_cpu {

// Activations of every column of some tiles, `rows` numbers each.
struct Columns {
  const Tiles* tiles;
  float* data;
  size_t rows;

  float* at(size_t tile, size_t row, size_t offset) const {
    return data + tiles->offset(tile, rows) + row * (*tiles)[tile].width + offset;
  }
  size_t width(size_t tile) const { return (*tiles)[tile].width; }
};

// What one layer adds to its scores; of the fields, those of its kind are set.
struct ScoreTerms {
  int32_t window = -1;                       // -1: every key is seen
  const ByDistance<float>* bias = nullptr;   // a series for each head
  const ByDistance<int32_t>* buckets = nullptr;
  Columns position_keys{}, position_queries{};  // a column for each bucket
  bool padding_sees = true;  // a query that is padding sees real keys

  bool any() const { return window >= 0 || bias != nullptr || buckets != nullptr; }
};

class HeadAttention {
 public:
  HeadAttention(const Layout& layout, const Kernels& kernels, size_t head_size, const float* zeros)
      : layout_(layout), k_(kernels), head_size_(head_size), zeros_(zeros) {}

  // Numbers of scratch that `attend` and `attend_rounded` need.
  static size_t scratch(const Layout& layout, size_t bucket_count, size_t widest, size_t head_size, int words) {
    return std::max((layout.longest() + 8 + 2 * (bucket_count + 8)) * widest,
                    rounded_scores_words(layout.longest(), widest, head_size, words));
  }

  // Rounds the keys and values of one row and head.
  void round_keys(size_t row, size_t head, const Columns& keys, const Columns& values, const Int8Kernels& k8,
                  const RoundedKeys& out) const {
    const std::vector<AttentionTask::Keys> stretches =
        tasks_of(keys_between(row, layout_.first_key(row), layout_.first_key(row + 1)), head * head_size_, keys, values);
    k8.round_keys(stretches.data(), uint32_t(stretches.size()), uint32_t(head_size_), out);
  }

  // As `attend`, in 8 bits, where nothing is added to the scores.
  void attend_rounded(const Stretch& query, size_t head, const Columns& queries, const RoundedKeys& keys,
                      const Columns& contexts, const Int8Kernels& k8, float* scratch) const {
    k8.attend(task_of(query, head, queries, contexts, scratch), keys);
  }

  void attend(const Stretch& query, size_t head, const Columns& queries, const Columns& keys, const Columns& values,
              const Columns& contexts, const ScoreTerms& terms, float* scratch) const {
    const size_t row = query.row, first_row = head * head_size_;
    AttentionTask task = task_of(query, head, queries, contexts, scratch);
    size_t begin = layout_.first_key(row), end = layout_.first_key(row + 1);
    if (layout_.blind(row) || !terms.any()) {
      const std::vector<AttentionTask::Keys> all = tasks_of(keys_between(row, begin, end), first_row, keys, values);
      return attend_to(task, all);
    }

    int32_t positions[kWidestTile * 16] = {};
    bool sees[kWidestTile * 16];
    for (uint32_t q = 0; q < query.count; q++) {
      const size_t column = queries.tiles == &layout_.tiles() ? (*queries.tiles)[query.tile].column + query.offset + q
                                                              : layout_.first_column(row);
      positions[q] = layout_.position(column);
      sees[q] = layout_.is_real(column);  // itself, if nothing else
      if (sees[q] || !terms.padding_sees) continue;
      size_t from = begin, upto = end;
      if (terms.window >= 0) near_keys(positions[q], positions[q], terms.window, from, upto);
      sees[q] = from < upto;
    }
    if (terms.window >= 0) near_keys(positions[0], positions[query.count - 1], terms.window, begin, end);
    if (begin < end) {
      const std::vector<Stretch> stretches = keys_between(row, begin, end);
      const std::vector<AttentionTask::Keys> near = tasks_of(stretches, first_row, keys, values);
      task.keys = near.data();
      task.key_stretches = uint32_t(near.size());
      const ScorePositions at{positions, layout_.key_positions() + begin, query.count, uint32_t(end - begin)};
      if (terms.window >= 0 && !some_are_far(at, terms.window)) {
        k_.attend(task);
      } else {
        k_.score(task);
        if (terms.window >= 0) k_.hide_far(task.scores, at, terms.window);
        if (terms.bias) k_.add_by_distance(task.scores, at, terms.bias->zero(head));
        if (terms.buckets) add_by_bucket(task, at, stretches, keys, first_row, terms);
        k_.mix(task);
      }
    }
    for (uint32_t q = 0; q < query.count; q++)
      if (!sees[q]) attend_alike(task, q, row, first_row, values);
  }

 private:
  // A task without keys.
  AttentionTask task_of(const Stretch& query, size_t head, const Columns& queries, const Columns& contexts,
                        float* scratch) const {
    const size_t first_row = head * head_size_;
    AttentionTask task{};
    task.query = layout_.blind(query.row) ? zeros_ : queries.at(query.tile, first_row, query.offset);
    task.query_width = queries.width(query.tile);
    task.context = contexts.at(query.tile, first_row, query.offset);
    task.context_width = contexts.width(query.tile);
    task.queries = query.count;
    task.head_size = uint32_t(head_size_);
    task.scores = scratch;
    return task;
  }

  void attend_to(AttentionTask task, const std::vector<AttentionTask::Keys>& keys) const {
    task.keys = keys.data();
    task.key_stretches = uint32_t(keys.size());
    k_.attend(task);
  }

  // One query attends to every token of its row alike.
  void attend_alike(AttentionTask task, uint32_t query, size_t row, size_t first_row, const Columns& values) const {
    task.query = zeros_;
    task.queries = 1;
    task.context += query;
    const std::vector<Stretch> all(layout_.queries_begin(row), layout_.queries_end(row));
    attend_to(task, tasks_of(all, first_row, values, values));
  }

  // The stretches of a row's keys [begin, end), counted over all rows.
  std::vector<Stretch> keys_between(size_t row, size_t begin, size_t end) const {
    std::vector<Stretch> stretches;
    stretches.reserve(size_t(layout_.keys_end(row) - layout_.keys_begin(row)));
    for (const Stretch* s = layout_.keys_begin(row); s < layout_.keys_end(row); s++) {
      const size_t from = std::max(begin, s->first), upto = std::min(end, s->first + s->count);
      if (from < upto) stretches.push_back({s->tile, s->offset + (from - s->first), uint32_t(upto - from), row, from});
    }
    return stretches;
  }

  static std::vector<AttentionTask::Keys> tasks_of(const std::vector<Stretch>& stretches, size_t first_row,
                                                   const Columns& keys, const Columns& values) {
    std::vector<AttentionTask::Keys> tasks;
    tasks.reserve(stretches.size());
    for (const Stretch& at : stretches)
      tasks.push_back({keys.at(at.tile, first_row, at.offset), values.at(at.tile, first_row, at.offset),
                       keys.width(at.tile), at.count});
    return tasks;
  }

  // Narrows [begin, end) to the keys within `window` of one of the queries.
  void near_keys(int32_t first, int32_t last, int32_t window, size_t& begin, size_t& end) const {
    const int32_t* const all = layout_.key_positions();
    const int32_t* const from = std::lower_bound(all + begin, all + end, int64_t(first) - window);
    const int32_t* const upto = std::upper_bound(from, all + end, int64_t(last) + window);
    begin = size_t(from - all);
    end = size_t(upto - all);
  }

  static bool some_are_far(const ScorePositions& at, int32_t window) {
    return at.query[at.queries - 1] - at.key[0] > window || at.key[at.keys - 1] - at.query[0] > window;
  }

  // The scores of content with the buckets between two distances, in rows as wide as the queries.
  void score_buckets(const AttentionTask& content, const Columns& buckets, size_t first_row, int32_t lowest, int32_t highest,
                     float* scores) const {
    std::vector<AttentionTask::Keys> keys;
    for (size_t column = size_t(lowest), last = size_t(highest); column <= last;) {
      const size_t tile = buckets.tiles->find(column), offset = column - (*buckets.tiles)[tile].column;
      const size_t count = std::min(last + 1 - column, buckets.width(tile) - offset);
      keys.push_back({buckets.at(tile, first_row, offset), nullptr, buckets.width(tile), uint32_t(count)});
      column += count;
    }
    AttentionTask task = content;
    task.keys = keys.data();
    task.key_stretches = uint32_t(keys.size());
    task.scores = scores;
    k_.score(task);
  }

  // DeBERTa's two further terms: query with the bucket's key, and key with the bucket's query.
  void add_by_bucket(const AttentionTask& task, const ScorePositions& all, const std::vector<Stretch>& stretches,
                     const Columns& keys, size_t first_row, const ScoreTerms& terms) const {
    const size_t lanes = size_t(k_.lanes), width = (task.queries + lanes - 1) / lanes * lanes;
    const int32_t* const bucket = terms.buckets->zero(0);
    const int32_t first = all.query[0], last = all.query[all.queries - 1];
    const int32_t lowest = bucket[first - all.key[all.keys - 1]], highest = bucket[last - all.key[0]];
    float* const of_query = task.scores + (all.keys + 8) * width;
    float* const of_key = of_query + (size_t(highest - lowest) + 1 + 8) * width;
    score_buckets(task, terms.position_keys, first_row, lowest, highest, of_query);
    for (const Stretch& stretch : stretches) {
      const int32_t* const positions = layout_.key_positions() + stretch.first;
      const int32_t low = bucket[first - positions[stretch.count - 1]], high = bucket[last - positions[0]];
      AttentionTask content = task;
      content.query = keys.at(stretch.tile, first_row, stretch.offset);
      content.query_width = keys.width(stretch.tile);
      content.queries = stretch.count;
      score_buckets(content, terms.position_queries, first_row, low, high, of_key);
      const size_t key_width = (stretch.count + lanes - 1) / lanes * lanes, done = size_t(positions - all.key);
      k_.add_by_bucket(task.scores + done * width, {all.query, positions, all.queries, stretch.count},
                       {of_query + size_t(low - lowest) * width, of_key, key_width, low, bucket});
    }
  }

  const Layout& layout_;
  const Kernels& k_;
  const size_t head_size_;
  const float* const zeros_;
};

// Where the rounded keys and values of each row and head lie.
class RoundedKeysLayout {
 public:
  RoundedKeysLayout(const Layout& layout, size_t rows, size_t heads, size_t head_size, const Int8Kernels& k8)
      : layout_(layout), head_size_(head_size), words_(k8.words), lanes_(k8.lanes) {
    for (size_t row = 0; row < rows; row++) {
      places_.push_back(size_);
      size_ += heads * words_of(row);
    }
  }

  size_t words() const { return size_; }  // of all

  RoundedKeys at(int32_t* data, size_t row, size_t head) const {
    return rounded_keys(data + places_[row] + head * words_of(row), count(row), head_size_, words_, lanes_);
  }

 private:
  size_t count(size_t row) const { return layout_.first_key(row + 1) - layout_.first_key(row); }
  size_t words_of(size_t row) const {
    return rounded_keys_words(rounded_keys_width(count(row), lanes_), head_size_, words_);
  }

  const Layout& layout_;
  const size_t head_size_;
  const int words_, lanes_;
  std::vector<size_t> places_;
  size_t size_ = 0;
};

}  // namespace sparse_cpu
