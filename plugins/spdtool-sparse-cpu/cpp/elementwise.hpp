// Functions of single numbers, on whole vectors. Included only by the kernels.
#pragma once

#include "vectors.hpp"

namespace {

// e^x within 2e-7 of it, for x in [-87, 88]; outside, the value at the end. 2^n by its bits, 2^fraction by a polynomial
// fitted on [-1/2, 1/2].
SPARSE_INLINE Vector exponential(Vector x) {
  x = lesser(greater(x, splat(-87.0f)), splat(88.0f));
  const Vector round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vector shifted = x * splat(1.4426950408889634f) + round;
  const Vector whole = shifted - round;
  Vector fraction = x * splat(1.4426950408889634f) - whole;
  fraction += x * splat(1.9259629911266175e-8f);  // what float32 leaves of log2(e)
  Vector p = splat(1.5469732e-4f);
  p = p * fraction + splat(1.34004321e-3f);
  p = p * fraction + splat(9.6180256e-3f);
  p = p * fraction + splat(5.55032721e-2f);
  p = p * fraction + splat(2.40226512e-1f);
  p = p * fraction + splat(6.93147207e-1f);
  p = p * fraction + splat(1.0f);
  const Integers n = (Integers)shifted - (Integers)round;
  return (Vector)((Integers)p + (n << 23));
}

// x/2 (1 + erf(x / sqrt 2)). The error function of x / sqrt 2 as x P(x^2) / Q(x^2), fitted on [-5.3, 5.3], where it is
// within 6e-7; beyond, it is 1 to that precision.
SPARSE_INLINE Vector gelu(Vector x) {
  const Vector z = lesser(greater(x, splat(-5.3f)), splat(5.3f)), s = z * z;
  Vector p = splat(1.25167228e-5f);
  p = p * s + splat(6.82526394e-4f);
  p = p * s + splat(1.13943646e-2f);
  p = p * s + splat(1.04079267e-1f);
  p = p * s + splat(7.97883658e-1f);
  Vector q = splat(5.29342838e-7f);
  q = q * s + splat(1.22397103e-4f);
  q = q * s + splat(2.86147282e-3f);
  q = q * s + splat(3.88112852e-2f);
  q = q * s + splat(2.97103398e-1f);
  q = q * s + splat(1.0f);
  const Vector half = x * splat(0.5f);
  return half + half * (z * p * inverse(q));
}

// The same within 2e-4, in half the time, for numbers that are rounded to steps of 1/255 of their range. The normal
// distribution less 1/2 as x P(x^2), fitted on [-4, 4] so that the error times x is least, and exact at the ends.
SPARSE_INLINE Vector coarse_gelu(Vector x) {
  const Vector z = lesser(greater(x, splat(-4.0f)), splat(4.0f)), s = z * z;
  Vector p = splat(2.25882063e-8f);
  p = p * s + splat(-1.58882707e-6f);
  p = p * s + splat(4.77638865e-5f);
  p = p * s + splat(-8.12187486e-4f);
  p = p * s + splat(8.76369115e-3f);
  p = p * s + splat(-6.45544129e-2f);
  p = p * s + splat(3.97870267e-1f);
  return x * (z * p + splat(0.5f));
}

// The approximation by tanh: x / (1 + e^(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3).
SPARSE_INLINE Vector gelu_tanh(Vector x) {
  const Vector u = splat(-1.5957691216f) * (x + splat(0.044715f) * x * x * x);
  return x * inverse(splat(1.0f) + exponential(u));
}

}  // namespace
