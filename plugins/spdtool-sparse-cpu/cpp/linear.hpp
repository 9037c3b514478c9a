// A sparse linear layer on rows of numbers, for any graph.
#pragma once

#include "linear_weights.hpp"
#include "team.hpp"

namespace sparse_cpu {

// y[n][rows] = activation(x[n][columns] W^T + bias). `x` and `y` do not overlap. Safe to call from several threads at once.
void linear(const LinearWeights& weights, Activation activation, const float* x, size_t n, float* y,
            const Machine& machine, const Lender& lender);

// Mean seconds of one product over `repeats` on one thread, with `tokens` columns that are in tiles, and rounded, already, as
// they are inside an encoder. For benchmarks.
double product_seconds(const LinearWeights& weights, size_t tokens, size_t repeats, const Machine& machine);

}  // namespace sparse_cpu
