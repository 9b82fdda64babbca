// The arithmetic that every formula is written in. Host and device, plain registers, no loads, no stores, no torch.
//
// A formula is written once, for V: a float, or as many floats as a register of the CPU holds (csrc/cpu/pack.h, which
// has what stands here from fma to smaller). Where elements of a V may differ, `select` chooses, not `?:`.
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
DF_INLINE float sqrt(float x) { return std::sqrt(x); }
DF_INLINE float magnitude(float x) { return std::fabs(x); }
DF_INLINE float select(bool which, float yes, float no) { return which ? yes : no; }
DF_INLINE bool any(bool which) { return which; }  // of a V's elements

// Of two. Where one is NaN, or both are zero, the second: as x86 has it.
DF_INLINE float larger(float a, float b) { return a > b ? a : b; }
DF_INLINE float smaller(float a, float b) { return a < b ? a : b; }

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
template <class V>
DF_INLINE V moving_average(V old, float weight, V a, V b = 1.0f) {
  return fma(weight * a, b, fma(-weight, old, old));
}

// A finite x beyond +-bound becomes that; infinities and NaN stay.
template <class V>
DF_INLINE V cut(V x, float bound) {
  return select(magnitude(x) == V(INFINITY), x, smaller(bound, larger(-bound, x)));
}

// A finite g whose square fp32 cannot hold, cut to where it can. An infinite second moment would stay, and the
// parameter with it, for ever; a second moment cut by itself would no longer match the first, and the step would be
// huge.
template <class V>
DF_INLINE V squarable(V g) {
  constexpr float kLargest = 0x1.fffffep63f;  // its square is below FLT_MAX
  return any(magnitude(g) > V(kLargest)) ? cut(g, kLargest) : g;
}

// Weight decay as a penalty: the gradient of decay / 2 * p^2 added to g. Without decay an infinite p does no harm.
template <class V>
DF_INLINE V penalized(V g, float decay, V p) {
  const bool none = to_bits(decay) << 1 == 0;  // asked once a register: the bits are seen sooner than the value
  return none ? g : fma(decay, p, g);
}

// One step down with decoupled weight decay: p - (step + decay * p), decay being lr * weight_decay. The sum is formed
// first, so only one rounding is of p's own size; a factor 1 - decay would in fp32 be off by up to 3e-8, always to the
// same side. An infinite p stays what it is.
template <class V>
DF_INLINE V descended(V p, V step, float decay) {
  return p - select(magnitude(p) == V(INFINITY), step, fma(decay, p, step));
}

}  // namespace deepfast
