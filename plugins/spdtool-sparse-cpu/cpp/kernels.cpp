// The inner loops. Compiled once for each instruction set; see kernels.hpp for the layout and for what may be included.
#include "kernels.hpp"

#include "context.hpp"
#include "elementwise.hpp"
#include "vectors.hpp"

namespace {

using namespace sparse_cpu;

constexpr size_t kLine = 16;  // numbers of a line of the cache

// ---- products

// Rows that one pass over a bundle accumulates in registers: as many as fit beside the inputs and the weights. Eight need
// the fewest passes; where a row is several vectors wide, fewer fit.
template <int V>
constexpr int rows_of_pass() {
  return V * 8 <= kRegisters / 2 ? 8 : V * 4 <= kRegisters * 3 / 4 ? 4 : 2;
}

template <int V, int Rows>
struct Sums {
  Vector at[Rows][V];

  template <bool First>
  SPARSE_INLINE void begin(float* const* y, const float* bias, const uint16_t* order) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) at[r][v] = First ? splat(bias[order[r]]) : load(y[r] + v * kLanes);
  }
  SPARSE_INLINE void end(float* const* y) const {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) store(y[r] + v * kLanes, at[r][v]);
  }
  template <int r>
  SPARSE_INLINE void add(Vector weight, const float* x) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) at[r][v] += weight * load(x + v * kLanes);
  }
};

// Two, four or eight 8-bit indexes by one load.
template <int Rows>
struct Indexes {
  uint64_t all;
  SPARSE_INLINE explicit Indexes(const uint8_t* p) : all(0) { __builtin_memcpy(&all, p, Rows); }
  template <int r>
  SPARSE_INLINE size_t get() const {
    return (all >> (8 * r)) & 255;
  }
};

// Weights to prefetch ahead, 4 KiB. For a single sentence this is faster than the processor's own prefetching: 1.3x at
// 1 x 32, where the weights come from memory.
constexpr size_t kAhead = 1024;

template <int V, int Rows>
SPARSE_INLINE void sparse_steps(Sums<V, Rows>& sums, const float* x, const uint8_t* index, const float* value,
                                uint32_t steps, bool first_pass) {
  constexpr size_t kWidth = V * kLanes;
#pragma GCC unroll 1
  for (uint32_t step = 0; step < steps; step++, index += kBundle, value += kBundle) {
    if (first_pass) __builtin_prefetch(value + kAhead, 0, 2);
    const Indexes<Rows> at(index);
    const Four low = four(value);
    sums.template add<0>(pick<0>(low), x + at.template get<0>() * kWidth);
    sums.template add<1>(pick<1>(low), x + at.template get<1>() * kWidth);
    if constexpr (Rows >= 4) {
      sums.template add<2>(pick<2>(low), x + at.template get<2>() * kWidth);
      sums.template add<3>(pick<3>(low), x + at.template get<3>() * kWidth);
    }
    if constexpr (Rows == 8) {
      const Four high = four(value + 4);
      sums.template add<4>(pick<0>(high), x + at.template get<4>() * kWidth);
      sums.template add<5>(pick<1>(high), x + at.template get<5>() * kWidth);
      sums.template add<6>(pick<2>(high), x + at.template get<6>() * kWidth);
      sums.template add<7>(pick<3>(high), x + at.template get<7>() * kWidth);
    }
  }
}

// All weights are stored: the rows share each input, which is loaded once.
template <int V, int Rows>
SPARSE_INLINE void dense_steps(Sums<V, Rows>& sums, const float* x, const float* value, uint32_t steps) {
  constexpr size_t kWidth = V * kLanes;
#pragma GCC unroll 1
  for (uint32_t step = 0; step < steps; step++, value += kBundle, x += kWidth) {
    Vector input[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) input[v] = load(x + v * kLanes);
    Vector weight[Rows];
    const Four low = four(value);
    weight[0] = pick<0>(low);
    weight[1] = pick<1>(low);
    if constexpr (Rows >= 4) {
      weight[2] = pick<2>(low);
      weight[3] = pick<3>(low);
    }
    if constexpr (Rows == 8) {
      const Four high = four(value + 4);
      weight[4] = pick<0>(high);
      weight[5] = pick<1>(high);
      weight[6] = pick<2>(high);
      weight[7] = pick<3>(high);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sums.at[r][v] += weight[r] * input[v];
  }
}

// One block. `First`: the sums begin with the bias; otherwise with what `y` holds.
template <int V, bool Dense, bool First>
void multiply_block(const MatrixView& matrix, const Block& block, const float* x, float* y) {
  constexpr size_t kWidth = V * kLanes;
  constexpr int kRows = rows_of_pass<V>();
  const float* bias = matrix.bias + block.row;
  const uint16_t* order = matrix.order + block.first_slot;
  const uint8_t* index = matrix.index + (Dense ? 0 : block.first_entry);
  const float* value = matrix.value + block.first_entry;
  for (const Run* run = matrix.runs + block.first_run, *last = run + block.runs; run < last; run++) {
    const uint32_t steps = run->steps;
    for (uint32_t bundle = 0; bundle < run->bundles; bundle++, order += kBundle) {
#pragma GCC unroll 4
      for (int pass = 0; pass < kBundle; pass += kRows) {
        float* rows[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) rows[r] = y + order[pass + r] * kWidth;
        Sums<V, kRows> sums;
        sums.template begin<First>(rows, bias, order + pass);
        if constexpr (Dense) {
          dense_steps(sums, x, value + pass, steps);
        } else {
          sparse_steps(sums, x, index + pass, value + pass, steps, pass == 0);
        }
        sums.end(rows);
      }
      if (!Dense) index += size_t(steps) * kBundle;
      value += size_t(steps) * kBundle;
    }
  }
}

template <int V>
void multiply_blocks(const MatrixView& matrix, size_t begin, size_t end, TileIn from, TileOut to) {
  constexpr size_t kWidth = V * kLanes;
  for (size_t b = begin; b < end; b++) {
    const Block& block = matrix.blocks[b];
    const float* x = from.data + (block.depth - from.origin) * kWidth;
    float* y = to.data + (block.row - to.origin) * kWidth;
    const bool dense = matrix.index == nullptr, first = block.depth == 0;
    const auto multiply_one = dense ? first ? multiply_block<V, true, true> : multiply_block<V, true, false>
                              : first ? multiply_block<V, false, true>
                                      : multiply_block<V, false, false>;
    multiply_one(matrix, block, x, y);
  }
}

void multiply(const MatrixView& matrix, size_t begin, size_t end, TileIn x, TileOut y, int vectors) {
  switch (vectors) {
    case 1: return multiply_blocks<1>(matrix, begin, end, x, y);
    case 2: return multiply_blocks<2>(matrix, begin, end, x, y);
    case 3: return multiply_blocks<3>(matrix, begin, end, x, y);
    default: return multiply_blocks<4>(matrix, begin, end, x, y);
  }
}

// ---- the weight gradient, at the live weights alone

// Four by four, which every instruction set does in registers.
SPARSE_INLINE void transpose(Quad (&q)[4]) {
  const Quad a = __builtin_shufflevector(q[0], q[1], 0, 4, 1, 5), b = __builtin_shufflevector(q[0], q[1], 2, 6, 3, 7);
  const Quad c = __builtin_shufflevector(q[2], q[3], 0, 4, 1, 5), d = __builtin_shufflevector(q[2], q[3], 2, 6, 3, 7);
  q[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  q[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  q[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  q[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

// `Count` entries of a row, whose inputs are multiplied by its row of the other tile; their sums stand in four lanes.
template <int V, int Count>
SPARSE_INLINE Quad sample_entries(const Vector (&row)[V], const float* x, const uint8_t* index) {
  Quad sums[4] = {};
#pragma GCC unroll 4
  for (int k = 0; k < Count; k++) {
    const float* input = x + size_t(index[k * kBundle]) * (V * kLanes);
    Vector sum = row[0] * load(input);
#pragma GCC unroll 4
    for (int v = 1; v < V; v++) sum += row[v] * load(input + v * kLanes);
    sums[k] = fold(sum);
  }
  transpose(sums);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <bool First>
SPARSE_INLINE void keep(float* sums, Quad found) {
  UnalignedQuad* place = reinterpret_cast<UnalignedQuad*>(sums);
  *place = First ? found : *place + found;
}

template <int V, bool First>
SPARSE_INLINE void sample_row(const Vector (&row)[V], const float* x, const uint8_t* index, uint32_t steps, float* sums) {
  uint32_t s = 0;
#pragma GCC unroll 1
  for (; s + 4 <= steps; s += 4, index += 4 * kBundle) keep<First>(sums + s, sample_entries<V, 4>(row, x, index));
  switch (steps - s) {
    case 1: return keep<First>(sums + s, sample_entries<V, 1>(row, x, index));
    case 2: return keep<First>(sums + s, sample_entries<V, 2>(row, x, index));
    case 3: return keep<First>(sums + s, sample_entries<V, 3>(row, x, index));
  }
}

// Rows of the other tile are read in an order that the processor cannot predict: prefetch this many ahead.
constexpr int kRowsAhead = 4;

template <int V, bool First>
void sample_block(const MatrixView& matrix, const Block& block, const float* x, const float* y, float* sums) {
  constexpr size_t kWidth = V * kLanes;
  const uint16_t* order = matrix.order + block.first_slot;
  const uint8_t* index = matrix.index + block.first_entry;
  for (size_t i = 0; i < block.depths * kWidth; i += kLine) __builtin_prefetch(x + i);
  for (const Run* run = matrix.runs + block.first_run, *last = run + block.runs; run < last; run++)
    for (uint32_t bundle = 0; bundle < run->bundles; bundle++, order += kBundle, index += size_t(run->steps) * kBundle)
      for (int r = 0; r < kBundle; r++, sums += (run->steps + 3) / 4 * 4) {
        for (size_t i = 0; i < kWidth; i += kLine) __builtin_prefetch(y + order[r + kRowsAhead] * kWidth + i);
        Vector row[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) row[v] = load(y + order[r] * kWidth + v * kLanes);
        sample_row<V, First>(row, x, index + r, run->steps, sums);
      }
}

template <int V>
void sample_tile(const MatrixView& matrix, const Block& block, TileIn x, TileIn y, float* sums, bool first) {
  const float* inputs = x.data + (block.depth - x.origin) * (V * kLanes);
  const float* rows = y.data + (block.row - y.origin) * (V * kLanes);
  first ? sample_block<V, true>(matrix, block, inputs, rows, sums) : sample_block<V, false>(matrix, block, inputs, rows, sums);
}

void sample(const MatrixView& matrix, size_t block, TileIn x, TileIn y, int vectors, float* sums, bool first) {
  switch (vectors) {
    case 1: return sample_tile<1>(matrix, matrix.blocks[block], x, y, sums, first);
    case 2: return sample_tile<2>(matrix, matrix.blocks[block], x, y, sums, first);
    case 3: return sample_tile<3>(matrix, matrix.blocks[block], x, y, sums, first);
    default: return sample_tile<4>(matrix, matrix.blocks[block], x, y, sums, first);
  }
}

// With 32 registers each loaded weight is used more often: the dense kernel comes nearer to the peak.
constexpr double kDenseAbove = kRegisters >= 32 ? 0.65 : 0.9;

// ---- element by element

template <class Function>
SPARSE_INLINE void each(float* x, size_t size, Function function) {
  size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(x + i, function(load(x + i)));
  if (i < size) {
    float rest[kLanes] = {};
    for (size_t k = i; k < size; k++) rest[k - i] = x[k];
    store(rest, function(load(rest)));
    for (size_t k = i; k < size; k++) x[k] = rest[k - i];
  }
}

void activate(Activation activation, float* x, size_t size) {
  switch (activation) {
    case Activation::kNone: return;
    case Activation::kRelu: return each(x, size, [](Vector v) { return greater(v, Vector{}); });
    case Activation::kGelu: return each(x, size, [](Vector v) { return gelu(v); });
    case Activation::kGeluTanh: return each(x, size, [](Vector v) { return gelu_tanh(v); });
  }
}

void scale_by(float* x, const float* y, size_t size) {
  size_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(x + i, load(x + i) * load(y + i));
  for (; i < size; i++) x[i] *= y[i];
}

// A tile is a whole number of vectors wide.
void rotate(float* x, size_t heads, size_t half, size_t width, const float* cosine, const float* sine) {
  const size_t size = half * width;
  for (size_t head = 0; head < heads; head++, x += 2 * size)
    for (size_t i = 0; i < size; i += kLanes) {
      const Vector a = load(x + i), b = load(x + size + i), c = load(cosine + i), s = load(sine + i);
      store(x + i, a * c - b * s);
      store(x + size + i, b * c + a * s);
    }
}

// ---- layer norm

template <int V>
void add_layer_norm_of(float* x, const float* y, float* out, size_t rows, const float* gain, const float* bias,
                       float epsilon, float* range) {
  constexpr size_t kWidth = V * kLanes;
  const Vector inverse_rows = splat(1.0f / float(rows));
  Vector mean[V] = {}, scale[V] = {};
  for (size_t r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      float* at = x + r * kWidth + v * kLanes;
      Vector sum = load(at);
      if (y) {
        sum += load(y + r * kWidth + v * kLanes);
        store(at, sum);
      }
      mean[v] += sum;
    }
  for (int v = 0; v < V; v++) mean[v] *= inverse_rows;
  for (size_t r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const Vector d = load(x + r * kWidth + v * kLanes) - mean[v];
      scale[v] += d * d;
    }
  for (int v = 0; v < V; v++) {
    const Vector variance = scale[v] * inverse_rows + splat(epsilon);
    for (int lane = 0; lane < kLanes; lane++) scale[v][lane] = 1.0f / __builtin_sqrtf(variance[lane]);
  }
  Vector least[V] = {}, most[V] = {};
  for (size_t r = 0; r < rows; r++) {
    const Vector g = splat(gain[r]), b = splat(bias[r]);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const size_t at = r * kWidth + v * kLanes;
      const Vector value = (load(x + at) - mean[v]) * (scale[v] * g) + b;
      store(out + at, value);
      least[v] = lesser(least[v], value);
      most[v] = greater(most[v], value);
    }
  }
  if (range == nullptr) return;
  for (int v = 0; v < V; v++) {
    store(range + v * kLanes, least[v]);
    store(range + kWidth + v * kLanes, most[v]);
  }
}

void add_layer_norm(float* x, const float* y, float* out, size_t rows, int vectors, const float* gain,
                    const float* bias, float epsilon, float* range) {
  switch (vectors) {
    case 1: return add_layer_norm_of<1>(x, y, out, rows, gain, bias, epsilon, range);
    case 2: return add_layer_norm_of<2>(x, y, out, rows, gain, bias, epsilon, range);
    case 3: return add_layer_norm_of<3>(x, y, out, rows, gain, bias, epsilon, range);
    default: return add_layer_norm_of<4>(x, y, out, rows, gain, bias, epsilon, range);
  }
}

// ---- attention

// Keys whose scores are computed and used before those of others, in long sequences. A stretch of keys has fewer.
constexpr uint32_t kKeysAtOnce = 512;

// Queries stand in the lanes, so softmax needs no sums across a vector: scores [key][query].
template <int V>
struct Attention {
  static constexpr int kGroup = V == 1 ? 8 : V == 2 ? 6 : kRegisters >= 32 ? 4 : 3;  // keys, or rows of values, at once
  static constexpr size_t kWidth = V * kLanes;

  // Scores of `Keys` keys; keeps the running maximum.
  template <int Keys>
  static SPARSE_INLINE void score(const AttentionTask& task, const float* key, size_t key_width, float* scores,
                                  Vector (&most)[V]) {
    Vector sum[Keys][V] = {};
    const float* query = task.query;
    for (uint32_t d = 0; d < task.head_size; d++, key += key_width, query += task.query_width) {
      Vector x[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) x[v] = load(query + v * kLanes);
#pragma GCC unroll 8
      for (int k = 0; k < Keys; k++) {
        const Vector weight = splat(key[k]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[k][v] += weight * x[v];
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < Keys; k++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        store(scores + k * kWidth + v * kLanes, sum[k][v]);
        most[v] = greater(most[v], sum[k][v]);
      }
  }

  // Adds the values of every key, weighted, to `Rows` rows of the context.
  template <int Rows>
  static SPARSE_INLINE void weigh(const AttentionTask& task, uint32_t d, Vector (&sum)[Rows][V]) {
    const float* weight = task.scores;
    for (uint32_t s = 0; s < task.key_stretches; s++) {
      const AttentionTask::Keys& keys = task.keys[s];
      const float* value = keys.value + d * keys.width;
      for (uint32_t k = 0; k < keys.count; k++, weight += kWidth) {
        Vector x[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) x[v] = load(weight + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
          const Vector one = splat(value[r * keys.width + k]);
#pragma GCC unroll 8
          for (int v = 0; v < V; v++) sum[r][v] += one * x[v];
        }
      }
    }
  }

  template <int Rows>
  static SPARSE_INLINE void mix(const AttentionTask& task, uint32_t d, const Vector (&inverse)[V]) {
    Vector sum[Rows][V] = {};
    weigh<Rows>(task, d, sum);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) write_context<V>(task, d + r, sum[r], inverse);
  }

  // The same for some of the keys: `sums` is scaled, and theirs are added.
  template <int Rows>
  static SPARSE_INLINE void mix_into(const AttentionTask& task, uint32_t d, float* sums, const Vector (&factor)[V]) {
    Vector sum[Rows][V];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[r][v] = load(sums + (d + r) * kWidth + v * kLanes) * factor[v];
    weigh<Rows>(task, d, sum);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) store(sums + (d + r) * kWidth + v * kLanes, sum[r][v]);
  }

  // Returns the end of the scores.
  static SPARSE_INLINE float* score_all(const AttentionTask& task, Vector (&most)[V]) {
    for (int v = 0; v < V; v++) most[v] = splat(-3e38f);
    float* scores = task.scores;
    for (uint32_t s = 0; s < task.key_stretches; s++) {
      const AttentionTask::Keys& keys = task.keys[s];
      uint32_t k = 0;
      for (; k + kGroup <= keys.count; k += kGroup, scores += kGroup * kWidth)
        score<kGroup>(task, keys.key + k, keys.width, scores, most);
      for (; k < keys.count; k++, scores += kWidth) score<1>(task, keys.key + k, keys.width, scores, most);
    }
    return scores;
  }

  // Replaces scores by their exponentials, and adds these up.
  static SPARSE_INLINE void exponentiate(float* at, const float* end, const Vector (&most)[V], Vector (&total)[V]) {
    for (; at < end; at += kWidth)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        const Vector e = exponential(load(at + v * kLanes) - most[v]);
        store(at + v * kLanes, e);
        total[v] += e;
      }
  }

  static SPARSE_INLINE void mix_all(const AttentionTask& task, const float* end, const Vector (&most)[V]) {
    Vector total[V] = {};
    exponentiate(task.scores, end, most, total);
    for (int v = 0; v < V; v++) total[v] = splat(1.0f) / total[v];
    uint32_t d = 0;
    for (; d + kGroup <= task.head_size; d += kGroup) mix<kGroup>(task, d, total);
    for (; d < task.head_size; d++) mix<1>(task, d, total);
  }

  static void attend(const AttentionTask& task) {
    uint32_t keys = 0;
    for (uint32_t s = 0; s < task.key_stretches; s++) keys += task.keys[s].count;
    if (keys > kKeysAtOnce + task.head_size) return attend_in_chunks(task);
    Vector most[V];
    const float* end = score_all(task, most);
    mix_all(task, end, most);
  }

  // Some keys at a time, so that their scores stay in the second-level cache. The sums of before are scaled whenever a larger
  // score is met.
  static void attend_in_chunks(const AttentionTask& task) {
    float* const sums = task.scores + kKeysAtOnce * kWidth;
    for (size_t i = 0; i < task.head_size * kWidth; i += kLanes) store(sums + i, Vector{});
    Vector most[V], total[V] = {};
    for (int v = 0; v < V; v++) most[v] = splat(-3e38f);
    for (uint32_t s = 0; s < task.key_stretches;) {
      AttentionTask chunk = task;
      chunk.keys = task.keys + s;
      chunk.key_stretches = 0;
      for (uint32_t keys = 0; s < task.key_stretches && keys + task.keys[s].count <= kKeysAtOnce; s++, chunk.key_stretches++)
        keys += task.keys[s].count;
      Vector highest[V], factor[V];
      const float* end = score_all(chunk, highest);
      for (int v = 0; v < V; v++) {
        highest[v] = greater(most[v], highest[v]);
        factor[v] = exponential(most[v] - highest[v]);
        most[v] = highest[v];
        total[v] *= factor[v];
      }
      exponentiate(chunk.scores, end, most, total);
      uint32_t d = 0;
      for (; d + kGroup <= task.head_size; d += kGroup) mix_into<kGroup>(chunk, d, sums, factor);
      for (; d < task.head_size; d++) mix_into<1>(chunk, d, sums, factor);
    }
    for (int v = 0; v < V; v++) total[v] = splat(1.0f) / total[v];
    for (uint32_t d = 0; d < task.head_size; d++) {
      Vector row[V];
      for (int v = 0; v < V; v++) row[v] = load(sums + d * kWidth + v * kLanes);
      write_context<V>(task, d, row, total);
    }
  }

  static void score_only(const AttentionTask& task) {
    Vector most[V];
    score_all(task, most);
  }

  static void mix_scored(const AttentionTask& task) {
    Vector most[V];
    for (int v = 0; v < V; v++) most[v] = splat(-3e38f);
    size_t keys = 0;
    for (uint32_t s = 0; s < task.key_stretches; s++) keys += task.keys[s].count;
    const float* const end = task.scores + keys * kWidth;
    for (const float* at = task.scores; at < end; at += kWidth)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) most[v] = greater(most[v], load(at + v * kLanes));
    mix_all(task, end, most);
  }
};

SPARSE_INLINE int vectors_of(uint32_t queries) { return int((queries + kLanes - 1) / kLanes); }

void attend(const AttentionTask& task) {
  switch (vectors_of(task.queries)) {
    case 1: return Attention<1>::attend(task);
    case 2: return Attention<2>::attend(task);
    case 3: return Attention<3>::attend(task);
    default: return Attention<4>::attend(task);
  }
}

void score(const AttentionTask& task) {
  switch (vectors_of(task.queries)) {
    case 1: return Attention<1>::score_only(task);
    case 2: return Attention<2>::score_only(task);
    case 3: return Attention<3>::score_only(task);
    default: return Attention<4>::score_only(task);
  }
}

void mix(const AttentionTask& task) {
  switch (vectors_of(task.queries)) {
    case 1: return Attention<1>::mix_scored(task);
    case 2: return Attention<2>::mix_scored(task);
    case 3: return Attention<3>::mix_scored(task);
    default: return Attention<4>::mix_scored(task);
  }
}

// ---- what positions add to scores

constexpr float kHidden = -3e38f;  // a score whose exponential is 0 beside any other

void hide_far(float* scores, const ScorePositions& at, int32_t window) {
  const int vectors = vectors_of(at.queries);
  const int32_t first = at.query[0], last = at.query[at.queries - 1];
  const Vector hidden = splat(kHidden);
  const Integers far = Integers{} + window;
  for (uint32_t k = 0; k < at.keys; k++, scores += vectors * kLanes) {
    const int32_t key = at.key[k];
    if (last - key <= window && key - first <= window) continue;  // near every query
    for (int v = 0; v < vectors; v++) {
      Integers query;
      __builtin_memcpy(&query, at.query + v * kLanes, sizeof(query));
      const Integers distance = query - key;
      const Vector value = load(scores + v * kLanes);
      store(scores + v * kLanes, (distance > far) | (distance < -far) ? hidden : value);
    }
  }
}

void add_by_distance(float* scores, const ScorePositions& at, const float* bias) {
  const int vectors = vectors_of(at.queries);
  const bool side_by_side = at.query[at.queries - 1] - at.query[0] == int32_t(at.queries - 1);
  for (uint32_t k = 0; k < at.keys; k++, scores += vectors * kLanes) {
    const ptrdiff_t key = at.key[k];
    if (side_by_side) {  // the lanes beyond the queries get numbers that nobody reads
      const float* const from = bias + (at.query[0] - key);
      for (int v = 0; v < vectors; v++) store(scores + v * kLanes, load(scores + v * kLanes) + load(from + v * kLanes));
    } else {
      for (uint32_t q = 0; q < at.queries; q++) scores[q] += bias[at.query[q] - key];
    }
  }
}

void add_by_bucket(float* scores, const ScorePositions& at, const BucketScores& add) {
  const size_t width = size_t(vectors_of(at.queries)) * kLanes;
  for (uint32_t k = 0; k < at.keys; k++, scores += width) {
    const int32_t* const bucket = add.bucket - ptrdiff_t(at.key[k]);
    const float* const of_key = add.of_key + k;
    for (uint32_t q = 0; q < at.queries; q++) {
      const size_t b = size_t(bucket[at.query[q]] - add.lowest);
      scores[q] += add.of_query[b * width + q] + of_key[b * add.key_width];
    }
  }
}

// ---- tables, and between rows and tiles

void add_float(float* sum, const uint8_t* row, size_t size) {
  for (size_t i = 0; i < size; i++) {
    float x;
    __builtin_memcpy(&x, row + 4 * i, 4);
    sum[i] += x;
  }
}

// As half_to_float in packed.cpp, without its branches: infinities were refused when the table was opened.
void add_half(float* sum, const uint8_t* row, size_t size) {
  for (size_t i = 0; i < size; i++) {
    uint16_t half;
    __builtin_memcpy(&half, row + 2 * i, 2);
    const uint32_t magnitude = half & 0x7fff, shifted = (magnitude << 13) + (uint32_t(127 - 15) << 23);
    const float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
    float normal;
    __builtin_memcpy(&normal, &shifted, 4);
    const float x = magnitude < 0x400 ? subnormal : normal;
    sum[i] += half & 0x8000 ? -x : x;
  }
}

void add_int8(float* sum, const uint8_t* row, size_t size, float scale) {
  for (size_t i = 0; i < size; i++) sum[i] += float(int8_t(row[i])) * scale;
}

// Three planes of bytes: their low bits are the first three quarters of the row, their high bits the last one.
void add_int6(float* __restrict sum, const uint8_t* row, size_t size, float scale) {
  const size_t quarter = size / 4;
  const auto widened = [scale](int bits) { return float(((bits & 63) ^ 32) - 32) * scale; };
  for (size_t i = 0; i < quarter; i++) {
    const int a = row[i], b = row[quarter + i], c = row[2 * quarter + i];
    sum[i] += widened(a);
    sum[quarter + i] += widened(b);
    sum[2 * quarter + i] += widened(c);
    sum[3 * quarter + i] += widened(a >> 6 | b >> 6 << 2 | c >> 6 << 4);
  }
}

// Moves one cache line of each row before the next line of any. Reads four rows at `line`; a null row is replaced by
// `none`.
template <class Row>
SPARSE_INLINE void at_line(Row const* rows, size_t line, Row none, Row (&at)[4]) {
  for (int k = 0; k < 4; k++) at[k] = rows[k] ? rows[k] + line : none;
}

void into_tile(const float* const* rows, size_t width, size_t size, float* tile) {
  static const float zeros[kLine] = {};
  const size_t whole = size / 4 * 4;
  for (size_t line = 0; line < whole; line += kLine)
    for (size_t c = 0; c < width; c += 4) {
      const float* from[4];
      at_line<const float*>(rows + c, line, zeros, from);
      float* to = tile + line * width + c;
      const size_t count = whole - line < kLine ? whole - line : kLine;
#pragma GCC unroll 4
      for (size_t i = 0; i < count; i += 4) {
        Quad q[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) q[k] = *reinterpret_cast<const UnalignedQuad*>(from[k] + i);
        transpose(q);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) *reinterpret_cast<UnalignedQuad*>(to + (i + k) * width) = q[k];
      }
    }
  for (size_t i = whole; i < size; i++)
    for (size_t c = 0; c < width; c++) tile[i * width + c] = rows[c] ? rows[c][i] : 0.0f;
}

void out_of_tile(const float* tile, size_t width, size_t size, float* const* rows) {
  float nowhere[kLine];
  const size_t whole = size / 4 * 4;
  for (size_t line = 0; line < whole; line += kLine)
    for (size_t c = 0; c < width; c += 4) {
      float* to[4];
      at_line<float*>(rows + c, line, nowhere, to);
      const float* from = tile + line * width + c;
      const size_t count = whole - line < kLine ? whole - line : kLine;
#pragma GCC unroll 4
      for (size_t i = 0; i < count; i += 4) {
        Quad q[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) q[k] = *reinterpret_cast<const UnalignedQuad*>(from + (i + k) * width);
        transpose(q);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) *reinterpret_cast<UnalignedQuad*>(to[k] + i) = q[k];
      }
    }
  for (size_t i = whole; i < size; i++)
    for (size_t c = 0; c < width; c++)
      if (rows[c]) rows[c][i] = tile[i * width + c];
}

}  // namespace

#define SPARSE_TEXT(x) SPARSE_TEXT_(x)
#define SPARSE_TEXT_(x) #x
#define SPARSE_NAME(isa) SPARSE_NAME_(isa)
#define SPARSE_NAME_(isa) kernels_##isa

namespace sparse_cpu {

// SPARSE_ISA is the name of the instruction set, given by the build.
extern const Kernels SPARSE_NAME(SPARSE_ISA);
const Kernels SPARSE_NAME(SPARSE_ISA) = {
    SPARSE_TEXT(SPARSE_ISA), kLanes, kDenseAbove, multiply, sample, activate, scale_by, add_layer_norm, rotate, attend, score, mix,
    hide_far, add_by_distance, add_by_bucket, add_float, add_half, add_int8, add_int6, into_tile, out_of_tile};

}  // namespace sparse_cpu
