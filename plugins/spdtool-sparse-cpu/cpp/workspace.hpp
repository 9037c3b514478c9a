// Memory of the forward passes of an encoder.
#pragma once

#include <cstring>
#include <vector>

#include "buffer.hpp"
#include "kernels.hpp"
#include "packed.hpp"
#include "positions.hpp"

namespace sparse_cpu {

// Buffers that outlive a batch, so that the next one allocates nothing.
struct EncoderWorkspace {
  // Activations of all columns, or of the first tokens only.
  struct Activations {
    Buffer<float> x, normed, query, context, product, inner;
    Buffer<int32_t> rounded, rounded_inner;
  };
  Activations all, first;
  Buffer<float> key, value, zeros;
  Buffer<int32_t> rounded_keys;  // and values
  RotaryTable rotary[2];
  Buffer<float> angles[2];  // cosines of every column, then sines
  ByDistance<float> bias;
  ByDistance<int32_t> buckets;
  std::vector<Buffer<float>> scratch;  // of each thread
};

// sum += a row of a table
inline void add_row(const Kernels& k, const Packed& table, int64_t row, float* sum) {
  const size_t columns = table.columns, first = size_t(row) * columns;
  switch (table.type) {
    case Values::kFloat32: return k.add_float(sum, table.values + 4 * first, columns);
    case Values::kFloat16: return k.add_half(sum, table.values + 2 * first, columns);
    case Values::kInt8: {
      float scale;
      std::memcpy(&scale, table.scales + 4 * row, 4);
      return k.add_int8(sum, table.values + first, columns, scale);
    }
    case Values::kInt6: {
      float scale;
      std::memcpy(&scale, table.scales + 4 * row, 4);
      return k.add_int6(sum, table.values + first / 4 * 3, columns, scale);
    }
  }
}

}  // namespace sparse_cpu
