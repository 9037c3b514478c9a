// Vectors of integers, and the two forms of a group of four 8-bit numbers. Included only by the kernels of int8.hpp.
#pragma once

#include "int8.hpp"
#include "vectors.hpp"

namespace {

using namespace sparse_cpu;

typedef int32_t UnalignedIntegers __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

SPARSE_INLINE Integers splat_integer(int32_t x) { return x - Integers{}; }
SPARSE_INLINE Integers load_integers(const int32_t* p) { return *reinterpret_cast<const UnalignedIntegers*>(p); }
SPARSE_INLINE void store_integers(int32_t* p, Integers v) { *reinterpret_cast<UnalignedIntegers*>(p) = v; }
SPARSE_INLINE Vector to_float(Integers v) { return __builtin_convertvector(v, Vector); }

// To the nearest integer, halves to the even one.
SPARSE_INLINE Integers nearest(Vector v) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (Integers)_mm_cvtps_epi32((__m128)v);
#elif defined(__ARM_NEON)
  return (Integers)vcvtnq_s32_f32((float32x4_t)v);
#else
  Integers result;
  for (int lane = 0; lane < kLanes; lane++) result[lane] = int32_t(__builtin_nearbyintf(v[lane]));
  return result;
#endif
}

// ---- the one primitive: four products of u8 and s8, added to a 32-bit lane

// The sums of the products of two pairs of 16-bit numbers in each lane.
SPARSE_INLINE Integers multiply_pairs(Integers a, Integers b) {
#if defined(__AVX512BW__)
  return (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX2__)
  return (Integers)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Where the machine multiplies bytes: a group of a token is one word.
struct Bytes {
  [[maybe_unused]] static constexpr int kWords = 1;
  [[maybe_unused]] static constexpr int32_t kMask = 0xff;  // of a number within a word
  using Number = int8_t;

  SPARSE_INLINE static Integers add_products(Integers sum, Integers x, Integers weight) {
#if defined(__AVX512VNNI__)
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weight);
#elif defined(__AVXVNNI__)
    return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)weight);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (Integers)vusdotq_s32((int32x4_t)sum, (uint8x16_t)x, (int8x16_t)weight);
#elif defined(__ARM_FEATURE_DOTPROD)
    // Its bytes are all signed. x is x - 128, by its highest bit, and 128 times the weights are a product with 64, twice;
    // that one is the same for every x, so compilers take it out of the loop over vectors.
    const int8x16_t bytes = (int8x16_t)weight, half = vdupq_n_s8(64);
    const int32x4_t missing = vdotq_s32(vdotq_s32(vdupq_n_s32(0), half, bytes), half, bytes);
    return (Integers)vdotq_s32((int32x4_t)sum + missing, (int8x16_t)(x ^ splat_integer(int32_t(0x80808080))), bytes);
#else  // the same by pairs, for tests of everything around it
    typedef int16_t Halves __attribute__((vector_size(kLanes * 4)));
    const Integers low = splat_integer(0x00ff00ff);
    const Halves odd_weight = (Halves)weight >> 8, even_weight = ((Halves)weight << 8) >> 8;
    return sum + multiply_pairs(x & low, (Integers)even_weight) +
           multiply_pairs((x >> 8) & low, (Integers)odd_weight);
#endif
  }

  SPARSE_INLINE static void store_group(const Integers (&input)[4], int32_t* out, size_t) {
    store_integers(out, (input[0] | (input[1] << 8)) | ((input[2] << 16) | (input[3] << 24)));
  }
};

// Elsewhere 16-bit numbers are multiplied, without any loss. (The instruction for bytes before VNNI saturates.)
struct Pairs {
  [[maybe_unused]] static constexpr int kWords = 2;
  [[maybe_unused]] static constexpr int32_t kMask = 0xffff;
  using Number = int16_t;

  SPARSE_INLINE static Integers add_products(Integers sum, Integers x, Integers weight) {
    return sum + multiply_pairs(x, weight);
  }

  SPARSE_INLINE static void store_group(const Integers (&input)[4], int32_t* out, size_t width) {
    store_integers(out, input[0] | (input[1] << 16));
    store_integers(out + width, input[2] | (input[3] << 16));
  }
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD) || defined(SPARSE_EMULATE_BYTES)
using Form = Bytes;
#else
using Form = Pairs;
#endif

}  // namespace
