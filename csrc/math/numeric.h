// The arithmetic that every formula is written in. Host and device, plain registers, no loads, no stores, no torch.
//
// Bitwise agreement between scalar C++, vectorized C++, CUDA and Triton rests on three rules: every multiply-add is an
// explicit fma (contraction is off), division and square root are the IEEE ones, and what is formed once per step
// (bias corrections, 1 - beta) is formed in fp64 and rounded once.
#pragma once

#include <cfloat>
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
DF_INLINE float fma(float a, float b, float c) { return std::fma(a, b, c); }

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

// base^exponent by repeated squaring: the same bits on every backend, which libm's pow does not promise.
DF_INLINE double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// An exponential moving average: beta * old + weight * x with weight = 1 - beta, x given as a product a * b.
//
// Written so that the two shares add up to exactly 1: beta and 1 - beta, each rounded to fp32, do not, and the average
// of a constant would come out wrong by up to 3e-5 (beta = 0.999). Exact for beta = 0, and nothing overflows that need
// not: no difference of the two is ever formed, and the weight is multiplied in first.
DF_INLINE float moving_average(float old, float weight, float a, float b = 1.0f) {
  return fma(weight * a, b, fma(-weight, old, old));
}

// A finite g whose square fp32 cannot hold, cut to where it can. An infinite second moment would stay, and the
// parameter with it, for ever; a second moment cut by itself would no longer match the first, and the step would be
// huge.
DF_INLINE float squarable(float g) {
  constexpr float kLargest = 0x1.fffffep63f;  // its square is below FLT_MAX
  const float magnitude = std::fabs(g);
  const bool cut = magnitude > kLargest && magnitude <= FLT_MAX;
  return cut ? from_bits(to_bits(kLargest) | (to_bits(g) & 0x80000000u)) : g;
}

// Weight decay as a penalty: the gradient of decay / 2 * p^2 added to g. Without decay an infinite p does no harm.
DF_INLINE float penalized(float g, float decay, float p) { return decay == 0.0f ? g : fma(decay, p, g); }

// One step down with decoupled weight decay: p - (step + decay * p), decay being lr * weight_decay. The sum is formed
// first, so only one rounding is of p's own size; a factor 1 - decay would in fp32 be off by up to 3e-8, always to the
// same side. An infinite p stays what it is.
DF_INLINE float descended(float p, float step, float decay) {
  return p - (std::fabs(p) > FLT_MAX ? step : fma(decay, p, step));
}

}  // namespace deepfast
