// Vectors of the instruction set that this file is compiled for. Included only by kernels.cpp.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define SPARSE_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__ARM_NEON)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

SPARSE_INLINE Vector splat(float x) { return x - Vector{}; }
SPARSE_INLINE Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
SPARSE_INLINE void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
SPARSE_INLINE Vector greater(Vector a, Vector b) { return a > b ? a : b; }
SPARSE_INLINE Vector lesser(Vector a, Vector b) { return a < b ? a : b; }

// 1 / x, within 3e-7 of it, for x whose reciprocal is no tiny number: a division of a whole vector takes as long as twenty
// products. Newton's step doubles the digits of the machine's estimate.
SPARSE_INLINE Vector inverse(Vector x) {
#if defined(__AVX512F__)
  const Vector estimate = (Vector)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
  const Vector estimate = (Vector)_mm256_rcp_ps((__m256)x);
#else
  return splat(1.0f) / x;
#endif
#if defined(__AVX2__)
  return estimate + estimate * (splat(1.0f) - x * estimate);
#endif
}

// Four weights by one load, each broadcast to every lane. To broadcast each weight from memory would take a load for every
// weight, and loads limit the sparse product.
#if defined(__AVX512F__)
typedef __m512 Four;
SPARSE_INLINE Four four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
template <int lane>
SPARSE_INLINE Vector pick(Four f) {
  return reinterpret_cast<Vector>(_mm512_permute_ps(f, lane * 0x55));
}
#elif defined(__AVX2__)
typedef __m256 Four;
SPARSE_INLINE Four four(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
template <int lane>
SPARSE_INLINE Vector pick(Four f) {
  return reinterpret_cast<Vector>(_mm256_permute_ps(f, lane * 0x55));
}
#elif defined(__SSE2__)
typedef __m128 Four;
SPARSE_INLINE Four four(const float* p) { return _mm_loadu_ps(p); }
template <int lane>
SPARSE_INLINE Vector pick(Four f) {
  return reinterpret_cast<Vector>(_mm_shuffle_ps(f, f, lane * 0x55));
}
#elif defined(__ARM_NEON)
typedef float32x4_t Four;
SPARSE_INLINE Four four(const float* p) { return vld1q_f32(p); }
template <int lane>
SPARSE_INLINE Vector pick(Four f) {
  return reinterpret_cast<Vector>(vdupq_laneq_f32(f, lane));
}
#else
typedef Vector Four;
SPARSE_INLINE Four four(const float* p) { return load(p); }
template <int lane>
SPARSE_INLINE Vector pick(Four f) {
  return splat(f[lane]);
}
#endif

// Adds the quarters, or halves, of a vector to four lanes, whose sum is that of the vector.
typedef float Quad __attribute__((vector_size(16)));
typedef float UnalignedQuad __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__AVX512F__)
SPARSE_INLINE Quad fold(Vector v) {
  const __m512d all = (__m512d)v;
  const __m256 half = (__m256)_mm512_castpd512_pd256(all) + (__m256)_mm512_extractf64x4_pd(all, 1);
  return (Quad)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
}
#elif defined(__AVX2__)
SPARSE_INLINE Quad fold(Vector v) {
  return (Quad)(_mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1));
}
#else
SPARSE_INLINE Quad fold(Vector v) { return (Quad)v; }
#endif

}  // namespace
