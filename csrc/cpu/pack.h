// V of csrc/math on a CPU: a float, or a Pack of as many as a register holds; and how both come from memory and go
// back.
//
// Where no instruction set is known, a Pack is one float, and the compiler vectorizes what it can.
#pragma once

#include "../codec/int8.h"
#include "../codec/split.h"
#include "../span.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "int8_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "int8_avx2.h"
#else
namespace deepfast::cpu {
using Pack = float;
DF_INLINE void order_past_caches() {}
}  // namespace deepfast::cpu
#endif

namespace deepfast::cpu {

template <class V>
constexpr int kWidth = 1;
template <class V>
  requires(V::kWidth > 1)
constexpr int kWidth<V> = V::kWidth;

// What a Pack's functions do, for one float.
DF_INLINE bool all(bool which) { return which; }
DF_INLINE float load(const float* from, float) { return *from; }
DF_INLINE uint16_t load(const uint16_t* from, float) { return *from; }
DF_INLINE void store(float x, float* to) { *to = x; }
DF_INLINE void store(uint16_t h, uint16_t* to) { *to = h; }
DF_INLINE void store_past_caches(uint16_t h, uint16_t* to) { *to = h; }
DF_INLINE float decode_fp16(uint16_t h) { return Fp16::decode(h); }
DF_INLINE float decode_bf16(uint16_t h) { return Bf16::decode(h); }
DF_INLINE uint16_t nearest_even_fp16(float x) { return Fp16::nearest_even(x); }
DF_INLINE uint16_t nearest_even_bf16(float x) { return Bf16::nearest_even(x); }
DF_INLINE uint16_t half_away_bf16(float x) { return Bf16::half_away(x); }
DF_INLINE float decode_split_fp16(uint16_t h, uint16_t remainder) { return SplitFp16::decode(h, remainder); }
DF_INLINE float decode_split_bf16(uint16_t h, uint16_t remainder) { return SplitBf16::decode(h, remainder); }
DF_INLINE uint16_t remainder_fp16(float x, uint16_t h) { return SplitFp16::remainder(x, h); }
DF_INLINE uint16_t remainder_bf16(float x, uint16_t h) { return SplitBf16::remainder(x, h); }

DF_INLINE uint32_t bits_of(Noise noise, uint32_t i, float) { return noise.bits(i); }
DF_INLINE uint16_t stochastic_fp16(float x, uint32_t chance) { return Fp16::stochastic(x, chance); }
DF_INLINE uint16_t stochastic_bf16(float x, uint32_t chance) { return Bf16::stochastic(x, chance); }
DF_INLINE uint32_t upper_half(uint32_t words) { return words >> 16; }

// Whether all elements are finite.
template <class V>
DF_INLINE bool finite(V x) {
  return all(magnitude(x) <= V(FLT_MAX));
}

// Of a 16-bit type.
template <class Half>
DF_INLINE auto decode(Half h, DType dtype) {
  return dtype == DType::kFloat16 ? decode_fp16(h) : decode_bf16(h);
}

// Where some element is not one of the many: one by one.
template <class V, class Encode>
[[gnu::noinline, gnu::cold]] auto encode_one_by_one(V x, Encode encode) {
  float each[kWidth<V>];
  uint16_t halves[kWidth<V>];
  store(x, each);
  for (int k = 0; k < kWidth<V>; ++k) halves[k] = encode(each[k]);
  return load(halves, V());
}

template <class V, class Encode>
DF_INLINE auto encode_each(V x, Encode encode) {
  if constexpr (kWidth<V> == 1) {
    return encode(x);
  } else {
    return encode_one_by_one(x, encode);
  }
}

// As torch rounds; and what is not NaN.
template <class V>
DF_INLINE auto nearest_even_number(V x, DType dtype) {
  return dtype == DType::kFloat16 ? nearest_even_fp16(x) : nearest_even_bf16(x);
}
template <class V>
DF_INLINE auto nearest_even(V x, DType dtype) {
  if (dtype == DType::kFloat16 || !any(x != x)) return nearest_even_number(x, dtype);
  return encode_each(x, Bf16::nearest_even);
}

// By the rule for weights with a master.
template <class V>
DF_INLINE auto from_master(V x, DType dtype) {
  if (dtype == DType::kFloat16) {
    return all(magnitude(x) <= V(Fp16::kLargest)) ? nearest_even_fp16(x) : encode_each(x, Fp16::from_master);
  }
  return all(magnitude(x) <= V(Bf16::kLargest)) ? half_away_bf16(x) : encode_each(x, Bf16::from_master);
}

// What a 16-bit weight and its remainder are together.
template <class Half>
DF_INLINE auto decode_split(Half h, Half remainder, DType dtype) {
  return dtype == DType::kFloat16 ? decode_split_fp16(h, remainder) : decode_split_bf16(h, remainder);
}

// What from_master(x, dtype) lacks of x.
template <class V, class Half>
DF_INLINE Half remainder(V x, Half h, DType dtype) {
  if (dtype == DType::kFloat16) {
    return all(magnitude(x) <= V(Fp16::kLargest))
               ? remainder_fp16(x, h)
               : encode_each(x, [](float e) { return remainder_fp16(e, Fp16::from_master(e)); });
  }
  return all(magnitude(x) <= V(Bf16::kLargest))
             ? remainder_bf16(x, h)
             : encode_each(x, [](float e) { return remainder_bf16(e, Bf16::from_master(e)); });
}

// By chance: that of element i and those that follow.
template <class V>
DF_INLINE auto stochastic(V x, Noise noise, uint32_t i, DType dtype) {
  if (!finite(x)) {
    return encode_each(x, [&, k = i](float e) mutable {
      const uint32_t chance = noise.bits(k++) >> 16;
      return dtype == DType::kFloat16 ? Fp16::stochastic(e, chance) : Bf16::stochastic(e, chance);
    });
  }
  const auto chance = upper_half(bits_of(noise, i, x));
  return dtype == DType::kFloat16 ? stochastic_fp16(x, chance) : stochastic_bf16(x, chance);
}

// Elements i .. i + V's width of a stream of any type.
template <class V>
DF_INLINE V load(const void* from, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return load(static_cast<const float*>(from) + i, V());
  return decode(load(static_cast<const uint16_t*>(from) + i, V()), dtype);
}

template <class V>
DF_INLINE void store(V x, void* to, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return store(x, static_cast<float*>(to) + i);
  store(nearest_even(x, dtype), static_cast<uint16_t*>(to) + i);
}

}  // namespace deepfast::cpu
