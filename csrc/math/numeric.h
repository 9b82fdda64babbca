// The arithmetic that every formula is written in. Host and device, plain registers, no loads, no stores, no torch.
//
// Bitwise agreement between scalar C++, vectorized C++, CUDA and Triton rests on three rules: every multiply-add is an
// explicit fma (contraction is off), division and square root are the IEEE ones, and what is formed once per step
// (bias corrections, 1 - beta) is formed in fp64 and rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DF_INLINE __host__ __device__ __forceinline__
#else
#define DF_INLINE inline __attribute__((always_inline))
#endif

namespace deepfast {

// a * b + c, rounded once.
DF_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// base^exponent by repeated squaring: the same bits on every backend, which libm's pow does not promise.
DF_INLINE double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// An exponential moving average, old <- beta * old + (1 - beta) * x.
//
// From beta = 1/2 on it is taken as old + (1 - beta) * (x - old): the other form would keep a bias, since beta rounded
// to fp32 and 1 - beta do not add up to 1 (3e-5 of the value for beta = 0.999). Below, as it is written, which is exact
// for beta = 0. Both are one expression, so that no loop has to branch.
struct MovingAverage {
  float weight;  // 1 - beta
  float minus;   // 1, or 0 below beta = 1/2
  float keep;    // 1, or beta

  static DF_INLINE MovingAverage of(double beta) {
    const bool close = beta >= 0.5;
    return {static_cast<float>(1.0 - beta), close ? 1.0f : 0.0f, close ? 1.0f : static_cast<float>(beta)};
  }

  DF_INLINE float operator()(float old, float x) const { return fma(weight, fma(-minus, old, x), keep * old); }
};

DF_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

DF_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace deepfast
