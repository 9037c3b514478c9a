// Where attention writes its results. Included only by the kernels.
#pragma once

#include "kernels.hpp"
#include "vectors.hpp"

namespace {

// Writes number `d` of the head's context of every query.
template <int V>
SPARSE_INLINE void write_context(const sparse_cpu::AttentionTask& task, uint32_t d, const Vector (&row)[V],
                                 const Vector (&factor)[V]) {
  constexpr size_t kWidth = V * kLanes;
  float* const out = task.context + d * task.context_width;
  if (task.queries == kWidth) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(out + v * kLanes, row[v] * factor[v]);
  } else {  // the lanes beyond belong to another sequence
    float lanes[kWidth];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(lanes + v * kLanes, row[v] * factor[v]);
    __builtin_memcpy(out, lanes, task.queries * sizeof(float));
  }
}

}  // namespace
