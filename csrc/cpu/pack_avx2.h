// Eight floats side by side: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include "../codec/noise.h"
#include "../codec/split.h"

namespace deepfast::cpu {

struct Pack {
  static constexpr int kWidth = 8;
  __m256 x;

  struct Mask {
    __m256 x;
    friend DF_INLINE bool any(Mask a) { return _mm256_movemask_ps(a.x) != 0; }
    friend DF_INLINE bool all(Mask a) { return _mm256_movemask_ps(a.x) == 0xff; }
  };

  Pack() = default;
  DF_INLINE Pack(__m256 x) : x(x) {}
  DF_INLINE Pack(float value) : x(_mm256_set1_ps(value)) {}

  friend DF_INLINE Pack operator+(Pack a, Pack b) { return _mm256_add_ps(a.x, b.x); }
  friend DF_INLINE Pack operator-(Pack a, Pack b) { return _mm256_sub_ps(a.x, b.x); }
  friend DF_INLINE Pack operator*(Pack a, Pack b) { return _mm256_mul_ps(a.x, b.x); }
  friend DF_INLINE Pack operator/(Pack a, Pack b) { return _mm256_div_ps(a.x, b.x); }
  friend DF_INLINE Mask operator>(Pack a, Pack b) { return {_mm256_cmp_ps(a.x, b.x, _CMP_GT_OQ)}; }
  friend DF_INLINE Mask operator<=(Pack a, Pack b) { return {_mm256_cmp_ps(a.x, b.x, _CMP_LE_OQ)}; }
  friend DF_INLINE Mask operator==(Pack a, Pack b) { return {_mm256_cmp_ps(a.x, b.x, _CMP_EQ_OQ)}; }
  friend DF_INLINE Mask operator!=(Pack a, Pack b) { return {_mm256_cmp_ps(a.x, b.x, _CMP_NEQ_UQ)}; }

  friend DF_INLINE Pack fma(Pack a, Pack b, Pack c) { return _mm256_fmadd_ps(a.x, b.x, c.x); }
  friend DF_INLINE Pack sqrt(Pack a) { return _mm256_sqrt_ps(a.x); }
  friend DF_INLINE Pack magnitude(Pack a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.x); }
  friend DF_INLINE Pack larger(Pack a, Pack b) { return _mm256_max_ps(a.x, b.x); }
  friend DF_INLINE Pack smaller(Pack a, Pack b) { return _mm256_min_ps(a.x, b.x); }
  friend DF_INLINE Pack select(Mask which, Pack yes, Pack no) { return _mm256_blendv_ps(no.x, yes.x, which.x); }
};

using Halves = __m128i;  // eight 16-bit values
using Words = __m256i;   // and 32-bit ones

DF_INLINE Pack load(const float* from, Pack) { return _mm256_loadu_ps(from); }
DF_INLINE Halves load(const uint16_t* from, Pack) { return _mm_loadu_si128(reinterpret_cast<const Halves*>(from)); }
DF_INLINE void store(Pack a, float* to) { _mm256_storeu_ps(to, a.x); }
DF_INLINE void store(Halves h, uint16_t* to) { _mm_storeu_si128(reinterpret_cast<Halves*>(to), h); }
DF_INLINE void store_past_caches(Halves h, uint16_t* to) { _mm_stream_si128(reinterpret_cast<Halves*>(to), h); }
DF_INLINE void order_past_caches() { _mm_sfence(); }

// csrc/codec/half.h, eight at a time.

DF_INLINE Pack decode_fp16(Halves h) { return _mm256_cvtph_ps(h); }
DF_INLINE Pack decode_bf16(Halves h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
DF_INLINE Halves nearest_even_fp16(Pack a) { return _mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT); }

// The upper half of each word.
DF_INLINE Halves upper(__m256i words) {
  const __m256i halves = _mm256_srli_epi32(words, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

// Of anything but NaN.
DF_INLINE Halves nearest_even_bf16(Pack a) {
  const __m256i bits = _mm256_castps_si256(a.x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return upper(_mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd)));
}

// Of finite values.
DF_INLINE Halves half_away_bf16(Pack a) {
  return upper(_mm256_add_epi32(_mm256_castps_si256(a.x), _mm256_set1_epi32(0x8000)));
}

// csrc/codec/split.h, eight at a time; remainders of what does not saturate.

DF_INLINE Pack decode_split_bf16(Halves h, Halves remainder) {
  const __m256i upper = _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
  const __m256i bits = _mm256_add_epi32(upper, _mm256_cvtepi16_epi32(remainder));
  const __m256 crosses = _mm256_castsi256_ps(_mm256_xor_si256(bits, upper));  // in the sign, which chooses
  return _mm256_blendv_ps(_mm256_castsi256_ps(bits), _mm256_castsi256_ps(upper), crosses);
}

DF_INLINE Halves remainder_bf16(Pack a, Halves) {
  const __m256i lower = _mm256_and_si256(_mm256_castps_si256(a.x), _mm256_set1_epi32(0xffff));
  return _mm_packus_epi32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256(lower, 1));
}

DF_INLINE Pack decode_split_fp16(Halves h, Halves remainder) {
  const Pack near = decode_fp16(h);
  const __m256i missing = _mm256_cvtepi16_epi32(remainder);
  const Pack normal = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(near.x), missing));
  const Pack below = fma(Pack(_mm256_cvtepi32_ps(missing)), Pack(-kUnitBelow), near);
  return select(Pack(kSmallestNormalFp16) > magnitude(near), below, normal);
}

DF_INLINE Halves remainder_fp16(Pack a, Halves h) {
  const Pack near = decode_fp16(h);
  const auto is_below = Pack(kSmallestNormalFp16) > magnitude(near);
  const __m256i below = _mm256_cvtps_epi32(((near - a) * Pack(1.0f / kUnitBelow)).x);
  const __m256i normal = _mm256_sub_epi32(_mm256_castps_si256(a.x), _mm256_castps_si256(near.x));
  const __m256i missing = _mm256_blendv_epi8(normal, below, _mm256_castps_si256(is_below.x));
  return _mm_packs_epi32(_mm256_castsi256_si128(missing), _mm256_extracti128_si256(missing, 1));
}

// csrc/codec/noise.h, of eight elements.
DF_INLINE Words bits_of(Noise noise, uint32_t i, Pack) {
  const auto mixed = [](__m256i x, int shift) { return _mm256_xor_si256(x, _mm256_srli_epi32(x, shift)); };
  __m256i x = _mm256_add_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32(i + noise.before));
  x = _mm256_mullo_epi32(mixed(x, 16), _mm256_set1_epi32(0x7feb352d));
  x = _mm256_xor_si256(mixed(x, 15), _mm256_set1_epi32(noise.between));
  return mixed(_mm256_mullo_epi32(x, _mm256_set1_epi32(0x846ca68bu)), 16);
}

DF_INLINE Words upper_half(Words words) { return _mm256_srli_epi32(words, 16); }

// Stochastic rounding of finite values; chance: sixteen bits in each word.
DF_INLINE Halves stochastic_bf16(Pack a, Words chance) {
  const __m256i bits = _mm256_castps_si256(a.x), sign = _mm256_and_si256(bits, _mm256_set1_epi32(1 << 31));
  const __m256i rounded = _mm256_add_epi32(_mm256_andnot_si256(sign, bits), chance);
  return upper(_mm256_or_si256(sign, _mm256_min_epu32(rounded, _mm256_set1_epi32(0x7f7fffff))));
}

DF_INLINE Halves stochastic_fp16(Pack a, Words chance) {
  const __m256i size = _mm256_castps_si256(magnitude(a).x);
  const __m256i exact = _mm256_sub_epi32(size, _mm256_set1_epi32(112 << 23));
  const __m256i normal = _mm256_srli_epi32(_mm256_add_epi32(exact, _mm256_srli_epi32(chance, 3)), 13);
  const __m256i units = _mm256_cvttps_epi32((magnitude(a) * Pack(1.0f / kUnitBelow)).x);
  const __m256i below = _mm256_srli_epi32(_mm256_add_epi32(units, chance), 16);
  const auto is_below = Pack(kSmallestNormalFp16) > magnitude(a);
  const __m256i rounded =
      _mm256_blendv_epi8(_mm256_min_epu32(normal, _mm256_set1_epi32(0x7bff)), below, _mm256_castps_si256(is_below.x));
  const __m256i sign = _mm256_srli_epi32(_mm256_and_si256(_mm256_castps_si256(a.x), _mm256_set1_epi32(1 << 31)), 16);
  const __m256i halves = _mm256_or_si256(rounded, sign);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

}  // namespace deepfast::cpu
