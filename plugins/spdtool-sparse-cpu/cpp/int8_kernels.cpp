// The inner loops of products of 8-bit numbers. See int8.hpp for the layout; kernels.hpp says what may be included.
#include "int8.hpp"

#include "elementwise.hpp"
#include "int8_attention.hpp"
#include "int8_vectors.hpp"

namespace {

// ---- products

// As many rows as fit into registers beside the inputs and a weight.
template <int V>
constexpr int rows_of_pass() {
  return V * 8 <= kRegisters / 2 ? 8 : V * 4 <= kRegisters * 3 / 4 ? 4 : 2;
}

// Two, four or eight 16-bit indexes by one load or two.
template <int Rows>
struct Groups {
  uint64_t all[2];
  SPARSE_INLINE explicit Groups(const uint16_t* p) {
    __builtin_memcpy(all, p, 8);
    if (Rows == 8) __builtin_memcpy(all + 1, p + 4, 8);
  }
  template <int r>
  SPARSE_INLINE size_t get() const {
    return (all[r / 4] >> (16 * (r % 4))) & 0xffff;
  }
};

template <int V, int Rows>
struct IntegerSums {
  static constexpr size_t kWidth = V * kLanes;
  Integers at[Rows][V] = {};

  template <int r>
  SPARSE_INLINE void add(const int32_t* weights, const int32_t* x) {
#pragma GCC unroll 2
    for (int word = 0; word < Form::kWords; word++) {
      const Integers weight = splat_integer(weights[r * Form::kWords + word]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++)
        at[r][v] = Form::add_products(at[r][v], load_integers(x + word * kWidth + v * kLanes), weight);
    }
  }
};

// Words of weights to prefetch ahead.
constexpr size_t kAhead = 1024;

template <int V, int Rows>
SPARSE_INLINE void add_steps(IntegerSums<V, Rows>& sums, const int32_t* x, const uint16_t* group, const int32_t* weights,
                             uint32_t steps, bool first_pass) {
  constexpr size_t kGroup = size_t(V) * kLanes * Form::kWords;
#pragma GCC unroll 1
  for (uint32_t step = 0; step < steps; step++, group += kBundle, weights += kBundle * Form::kWords) {
    if (first_pass) __builtin_prefetch(weights + kAhead, 0, 2);
    const Groups<Rows> at(group);
    sums.template add<0>(weights, x + at.template get<0>() * kGroup);
    sums.template add<1>(weights, x + at.template get<1>() * kGroup);
    if constexpr (Rows >= 4) {
      sums.template add<2>(weights, x + at.template get<2>() * kGroup);
      sums.template add<3>(weights, x + at.template get<3>() * kGroup);
    }
    if constexpr (Rows == 8) {
      sums.template add<4>(weights, x + at.template get<4>() * kGroup);
      sums.template add<5>(weights, x + at.template get<5>() * kGroup);
      sums.template add<6>(weights, x + at.template get<6>() * kGroup);
      sums.template add<7>(weights, x + at.template get<7>() * kGroup);
    }
  }
}

// One block. `First`: y begins with the bias; otherwise with what it holds.
template <int V, bool First>
void multiply_block(const Int8View& matrix, const Int8Block& block, const RoundedTile& x, float* y) {
  constexpr size_t kWidth = V * kLanes;
  constexpr int kRows = rows_of_pass<V>();
  const float *scale = matrix.scale + block.row, *bias = matrix.bias + block.row;
  const uint16_t* group = matrix.group + block.first_entry;
  const int32_t* weights = matrix.weights + block.first_entry * Form::kWords;
  for (uint32_t bundle = block.first_bundle; bundle < block.first_bundle + block.bundles; bundle++) {
    const uint32_t steps = matrix.steps[bundle];
#pragma GCC unroll 4
    for (int pass = 0; pass < kBundle; pass += kRows) {
      IntegerSums<V, kRows> sums;
      add_steps(sums, x.data, group + pass, weights + pass * Form::kWords, steps, pass == 0);
      const size_t slot = size_t(bundle) * kBundle + pass;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        const uint16_t row = matrix.order[slot + r];
        float* out = y + row * kWidth;
        const Integers sum = splat_integer(matrix.sum[slot + r]);
        const Vector row_scale = splat(scale[row]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
          const Integers shifted = sums.at[r][v] - load_integers(x.zero + v * kLanes) * sum;
          const Vector product = to_float(shifted) * row_scale * load(x.scale + v * kLanes);
          store(out + v * kLanes, product + (First ? splat(bias[row]) : load(out + v * kLanes)));
        }
      }
    }
    group += size_t(steps) * kBundle;
    weights += size_t(steps) * kBundle * Form::kWords;
  }
}

template <int V>
void multiply_blocks(const Int8View& matrix, size_t begin, size_t end, const RoundedTile& x, uint32_t origin, TileOut y) {
  constexpr size_t kWidth = V * kLanes;
  for (size_t b = begin; b < end; b++) {
    const Int8Block& block = matrix.blocks[b];
    const size_t skipped = block.depth - origin, chunk = skipped / kInputsOfChunk;
    const RoundedTile part = {x.scale + chunk * kWidth, x.zero + chunk * kWidth,
                              x.data + skipped / kInputsOfGroup * Form::kWords * kWidth};
    float* out = y.data + (block.row - y.origin) * kWidth;
    block.depth == 0 ? multiply_block<V, true>(matrix, block, part, out) : multiply_block<V, false>(matrix, block, part, out);
  }
}

void multiply(const Int8View& matrix, size_t begin, size_t end, const RoundedTile& x, uint32_t origin, TileOut y,
              int vectors) {
  switch (vectors) {
    case 1: return multiply_blocks<1>(matrix, begin, end, x, origin, y);
    case 2: return multiply_blocks<2>(matrix, begin, end, x, origin, y);
    case 3: return multiply_blocks<3>(matrix, begin, end, x, origin, y);
    default: return multiply_blocks<4>(matrix, begin, end, x, origin, y);
  }
}

// ---- rounding

// `round_tokens` of spdtool/models/int8.py for the columns of one chunk. The activation is applied in the pass that looks
// for the range.
template <int V, class Function>
SPARSE_INLINE void round_chunk(float* x, size_t rows, bool changes, Function function, RoundedTile out,
                               const float* range = nullptr) {
  constexpr size_t kWidth = V * kLanes;
  Vector least[V] = {}, most[V] = {}, reciprocal[V];
  Integers zero[V];
  if (range)
    for (int v = 0; v < V; v++) {
      least[v] = load(range + v * kLanes);
      most[v] = load(range + kWidth + v * kLanes);
    }
  for (size_t r = 0; r < (range ? 0 : rows); r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* at = x + r * kWidth + v * kLanes;
      const Vector value = function(load(at));
      if (changes) store(at, value);
      least[v] = lesser(least[v], value);
      most[v] = greater(most[v], value);
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const Vector spread = most[v] - least[v];
    const Vector scale = spread > splat(1e-30f) ? spread / splat(255.0f) : splat(1.0f);
    reciprocal[v] = splat(1.0f) / scale;
    zero[v] = nearest(-least[v] * reciprocal[v]);
    store(out.scale + v * kLanes, scale);
    store_integers(out.zero + v * kLanes, zero[v]);
  }
  for (size_t r = 0; r < rows; r += kInputsOfGroup, x += kInputsOfGroup * kWidth, out.data += Form::kWords * kWidth)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      Integers input[kInputsOfGroup];
#pragma GCC unroll 4
      for (size_t i = 0; i < kInputsOfGroup; i++) {
        // Never below 0: the least of a column rounds to minus the zero point.
        const Integers value = nearest(load(x + i * kWidth + v * kLanes) * reciprocal[v]) + zero[v];
        input[i] = value < splat_integer(255) ? value : splat_integer(255);
      }
      Form::store_group(input, out.data + v * kLanes, kWidth);
    }
}

template <int V>
void round_tile(Activation activation, float* x, size_t rows, RoundedTile out, const float* range) {
  constexpr size_t kWidth = V * kLanes;
  for (size_t row = 0; row < rows; row += kInputsOfChunk) {
    const size_t count = rows - row < kInputsOfChunk ? rows - row : kInputsOfChunk;
    switch (activation) {
      case Activation::kNone: round_chunk<V>(x, count, false, [](Vector v) { return v; }, out, range); break;
      case Activation::kRelu: round_chunk<V>(x, count, true, [](Vector v) { return greater(v, Vector{}); }, out); break;
      case Activation::kGelu: round_chunk<V>(x, count, true, [](Vector v) { return coarse_gelu(v); }, out); break;
      case Activation::kGeluTanh: round_chunk<V>(x, count, true, [](Vector v) { return gelu_tanh(v); }, out); break;
    }
    x += count * kWidth;
    out.scale += kWidth;
    out.zero += kWidth;
    out.data += count / kInputsOfGroup * Form::kWords * kWidth;
  }
}

void round(Activation activation, float* x, size_t rows, int vectors, RoundedTile out, const float* range) {
  switch (vectors) {
    case 1: return round_tile<1>(activation, x, rows, out, range);
    case 2: return round_tile<2>(activation, x, rows, out, range);
    case 3: return round_tile<3>(activation, x, rows, out, range);
    default: return round_tile<4>(activation, x, rows, out, range);
  }
}

}  // namespace

#define SPARSE_TEXT(x) SPARSE_TEXT_(x)
#define SPARSE_TEXT_(x) #x
#define SPARSE_NAME(isa) SPARSE_NAME_(isa)
#define SPARSE_NAME_(isa) int8_kernels_##isa

namespace sparse_cpu {

extern const Int8Kernels SPARSE_NAME(SPARSE_ISA);
const Int8Kernels SPARSE_NAME(SPARSE_ISA) = {SPARSE_TEXT(SPARSE_ISA), kLanes, Form::kWords, round, multiply, round_keys, attend};

}  // namespace sparse_cpu
