// Attention in 8 bits, as `attend_rounded` of spdtool/models/int8.py defines it. Included only by int8_kernels.cpp.
//
// Queries stand in the lanes, as in kernels.cpp. A score is a sum over groups of inputs, a number of the context one over
// groups of keys; keys and values are the weights of these products, and are broadcast.
#pragma once

#include "context.hpp"
#include "int8_vectors.hpp"

namespace {

SPARSE_INLINE Vector magnitude(Vector v) { return (Vector)((Integers)v & splat_integer(0x7fffffff)); }

// The step of numbers of which the largest becomes 127.
SPARSE_INLINE Vector signed_scale(Vector largest) {
  return largest > splat(1e-30f) ? largest / splat(127.0f) : splat(1.0f);
}

// 255 * 2^x for x <= 0, to the nearest integer: 2^fraction within 1e-4 of it, a fortieth of a step at most.
SPARSE_INLINE Integers probability(Vector x) {
  x = greater(x, splat(-16.0f));  // where it is 0
  const Vector round = splat(12582912.0f);  // 1.5 * 2^23, as in `exponential`; its own bits are shifted out
  const Vector shifted = x + round, fraction = x - (shifted - round);
  Vector p = splat(14.0272718f);
  p = p * fraction + splat(61.7638505f);
  p = p * fraction + splat(176.787153f);
  p = p * fraction + splat(255.0f);
  return nearest((Vector)((Integers)p + ((Integers)shifted << 23)));
}

typedef Form::Number Numbers __attribute__((vector_size(kLanes * sizeof(Form::Number))));

void round_each_key(const AttentionTask::Keys& keys, uint32_t head_size, uint32_t first, const RoundedKeys& out) {
  for (uint32_t k = 0; k < keys.count; k += kLanes) {
    const float* const x = keys.key + k;
    Vector largest{};
    for (uint32_t d = 0; d < head_size; d++) largest = greater(largest, magnitude(load(x + d * keys.width)));
    const Vector scale = signed_scale(largest), reciprocal = splat(1.0f) / scale;
    Integers sum{};
    for (uint32_t d = 0; d < head_size; d += kInputsOfGroup) {
      Integers input[kInputsOfGroup];
#pragma GCC unroll 4
      for (uint32_t i = 0; i < kInputsOfGroup; i++) {
        input[i] = nearest(load(x + (d + i) * keys.width) * reciprocal);
        sum += input[i];
        input[i] &= splat_integer(Form::kMask);
      }
      Form::store_group(input, out.key + size_t(d / kInputsOfGroup) * Form::kWords * out.width + first + k, out.width);
    }
    store(out.scale + first + k, scale);
    store(out.sum + first + k, to_float(sum));
  }
}

SPARSE_INLINE float largest_lane(Vector v) {
  Quad quads[kLanes / 4];
  __builtin_memcpy(quads, &v, sizeof v);
  for (int q = 1; q < kLanes / 4; q++) quads[0] = quads[0] > quads[q] ? quads[0] : quads[q];
  const float left = quads[0][0] > quads[0][1] ? quads[0][0] : quads[0][1];
  const float right = quads[0][2] > quads[0][3] ? quads[0][2] : quads[0][3];
  return left > right ? left : right;
}

float largest_of(const AttentionTask::Keys* stretches, uint32_t count, uint32_t input) {
  Vector most{};
  for (uint32_t s = 0; s < count; s++) {
    const AttentionTask::Keys& keys = stretches[s];
    const float* const x = keys.value + input * keys.width;
    uint32_t k = 0;
    for (; k + kLanes <= keys.count; k += kLanes) most = greater(most, magnitude(load(x + k)));
    if (k == keys.count) continue;
    float rest[kLanes] = {};  // the lanes beyond belong to other sequences
    __builtin_memcpy(rest, x + k, (keys.count - k) * sizeof(float));
    most = greater(most, magnitude(load(rest)));
  }
  return largest_lane(most);
}

void round_keys(const AttentionTask::Keys* stretches, uint32_t count, uint32_t head_size, const RoundedKeys& out) {
  float factor[kMostRoundedInputs + kLanes];  // of each input of the values
  for (uint32_t d = 0; d < head_size; d++) factor[d] = largest_of(stretches, count, d);
  for (uint32_t d = 0; d < head_size; d += kLanes) {  // a last vector reaches into the keys, which come next
    const Vector scale = signed_scale(load(factor + d));
    store(out.value_scale + d, scale);
    store(factor + d, splat(1.0f) / scale);
  }
  for (uint32_t s = 0, first = 0; s < count; first += stretches[s++].count)
    round_each_key(stretches[s], head_size, first, out);
  for (uint32_t d = 0; d < head_size; d++) {
    const Vector reciprocal = splat(factor[d]);
    Form::Number* at = reinterpret_cast<Form::Number*>(out.value) + size_t(d) * out.width;
    for (uint32_t s = 0; s < count; at += stretches[s++].count) {
      const float* const x = stretches[s].value + d * stretches[s].width;
      for (uint32_t k = 0; k < stretches[s].count; k += kLanes) {  // what is written beyond is written over, or times 0
        const Numbers numbers = __builtin_convertvector(nearest(load(x + k) * reciprocal), Numbers);
        __builtin_memcpy(at + k, &numbers, sizeof numbers);
      }
    }
  }
}

template <int V>
class RoundedAttention {
 public:
  RoundedAttention(const AttentionTask& task, const RoundedKeys& keys) : task_(task), keys_(keys) {}

  void attend() {
    round_queries();
    for (int v = 0; v < V; v++) most_[v] = splat(-3e38f);
    uint32_t k = 0;
    for (; k + kGroup <= keys_.count; k += kGroup) score<kGroup>(k);
    for (; k < keys_.count; k++) score<1>(k);
    exponentiate();
    uint32_t d = 0;
    for (; d + kGroup <= task_.head_size; d += kGroup) mix<kGroup>(d);
    for (; d < task_.head_size; d++) mix<1>(d);
  }

 private:
  static constexpr int kGroup = V == 1 ? 8 : V == 2 ? 6 : kRegisters >= 32 ? 4 : 3;  // keys, or inputs, at once
  static constexpr size_t kWidth = V * kLanes;

  int32_t* queries() const { return reinterpret_cast<int32_t*>(task_.scores) + keys_.count * kWidth; }
  int32_t* probabilities() const { return reinterpret_cast<int32_t*>(task_.scores); }  // in place of the scores

  void round_queries() {
    const float* const x = task_.query;
    for (int v = 0; v < V; v++) {
      Vector least{}, most{};
      for (uint32_t d = 0; d < task_.head_size; d++) {
        const Vector value = load(x + d * task_.query_width + v * kLanes);
        least = lesser(least, value);
        most = greater(most, value);
      }
      const Vector spread = most - least;
      const Vector scale = spread > splat(1e-30f) ? spread / splat(255.0f) : splat(1.0f);
      const Vector reciprocal = splat(1.0f) / scale;
      const Integers zero = nearest(-least * reciprocal);
      int32_t* out = queries() + v * kLanes;
      for (uint32_t d = 0; d < task_.head_size; d += kInputsOfGroup, out += Form::kWords * kWidth) {
        Integers input[kInputsOfGroup];
#pragma GCC unroll 4
        for (uint32_t i = 0; i < kInputsOfGroup; i++) {
          const Integers value = nearest(load(x + (d + i) * task_.query_width + v * kLanes) * reciprocal) + zero;
          input[i] = value < splat_integer(255) ? value : splat_integer(255);
        }
        Form::store_group(input, out, kWidth);
      }
      zero_[v] = to_float(zero);
      power_[v] = scale * splat(1.4426950408889634f);
    }
  }

  // Scores in units of a query's scale; keeps the largest.
  template <int Keys>
  SPARSE_INLINE void score(uint32_t first) {
    Integers sum[Keys][V] = {};
    const int32_t *query = queries(), *key = keys_.key + first;
    const uint32_t words = task_.head_size / kInputsOfGroup * Form::kWords;
    for (uint32_t word = 0; word < words; word++, query += kWidth, key += keys_.width) {
      Integers x[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) x[v] = load_integers(query + v * kLanes);
#pragma GCC unroll 8
      for (int k = 0; k < Keys; k++) {
        const Integers weight = splat_integer(key[k]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[k][v] = Form::add_products(sum[k][v], x[v], weight);
      }
    }
    float* const scores = task_.scores + first * kWidth;
#pragma GCC unroll 8
    for (int k = 0; k < Keys; k++) {
      const Vector key_sum = splat(keys_.sum[first + k]), scale = splat(keys_.scale[first + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        const Vector one = (to_float(sum[k][v]) - zero_[v] * key_sum) * scale;
        store(scores + k * kWidth + v * kLanes, one);
        most_[v] = greater(most_[v], one);
      }
    }
  }

  // Four keys of some queries; those from `real` on are none.
  SPARSE_INLINE void exponentiate(uint32_t first, uint32_t real, int v, Integers& total) {
    Integers input[kInputsOfGroup];
    const Vector highest = most_[v] * power_[v];
    const float* const scores = task_.scores + first * kWidth + v * kLanes;
#pragma GCC unroll 4
    for (uint32_t i = 0; i < kInputsOfGroup; i++) {
      input[i] = i < real ? probability(load(scores + i * kWidth) * power_[v] - highest) : Integers{};
      total += input[i];
    }
    Form::store_group(input, probabilities() + first / kInputsOfGroup * Form::kWords * kWidth + v * kLanes, kWidth);
  }

  // Replaces scores by probabilities, 255 for the largest of each query, and adds these up.
  void exponentiate() {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      Integers total{};
      uint32_t k = 0;
      for (; k + kInputsOfGroup <= keys_.count; k += kInputsOfGroup) exponentiate(k, kInputsOfGroup, v, total);
      if (k < keys_.count) exponentiate(k, keys_.count - k, v, total);
      inverse_[v] = splat(1.0f) / to_float(total);
    }
  }

  // Some inputs of the context.
  template <int Inputs>
  SPARSE_INLINE void mix(uint32_t d) {
    Integers sum[Inputs][V] = {};
    const int32_t *weight = probabilities(), *value = keys_.value + size_t(d) * row_words();
    const uint32_t words = (keys_.count + kInputsOfGroup - 1) / kInputsOfGroup * Form::kWords;
    for (uint32_t word = 0; word < words; word++, weight += kWidth) {
      Integers x[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) x[v] = load_integers(weight + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < Inputs; i++) {
        int32_t four;
        __builtin_memcpy(&four, value + i * row_words() + word, sizeof four);  // it was written as smaller numbers
        const Integers one = splat_integer(four);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[i][v] = Form::add_products(sum[i][v], x[v], one);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Inputs; i++) {
      Vector row[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) row[v] = to_float(sum[i][v]) * splat(keys_.value_scale[d + i]);
      write_context<V>(task_, d + i, row, inverse_);
    }
  }

  size_t row_words() const { return keys_.width / kInputsOfGroup * Form::kWords; }

  const AttentionTask& task_;
  const RoundedKeys& keys_;
  Vector zero_[V], power_[V], most_[V], inverse_[V];  // of each query; `power_`: of two, for a step of its scores
};

void attend(const AttentionTask& task, const RoundedKeys& keys) {
  switch (int((task.queries + kLanes - 1) / kLanes)) {
    case 1: return RoundedAttention<1>(task, keys).attend();
    case 2: return RoundedAttention<2>(task, keys).attend();
    case 3: return RoundedAttention<3>(task, keys).attend();
    default: return RoundedAttention<4>(task, keys).attend();
  }
}

}  // namespace
