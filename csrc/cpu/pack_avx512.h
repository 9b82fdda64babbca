// Sixteen floats side by side: AVX-512 F, BW, VL.
#pragma once

#include <immintrin.h>

#include "../codec/noise.h"
#include "../codec/split.h"

namespace deepfast::cpu {

struct Pack {
  static constexpr int kWidth = 16;
  __m512 x;

  struct Mask {
    __mmask16 x;
    friend DF_INLINE bool any(Mask a) { return a.x != 0; }
    friend DF_INLINE bool all(Mask a) { return a.x == 0xffff; }
  };

  Pack() = default;
  DF_INLINE Pack(__m512 x) : x(x) {}
  DF_INLINE Pack(float value) : x(_mm512_set1_ps(value)) {}

  friend DF_INLINE Pack operator+(Pack a, Pack b) { return _mm512_add_ps(a.x, b.x); }
  friend DF_INLINE Pack operator-(Pack a, Pack b) { return _mm512_sub_ps(a.x, b.x); }
  friend DF_INLINE Pack operator*(Pack a, Pack b) { return _mm512_mul_ps(a.x, b.x); }
  friend DF_INLINE Pack operator/(Pack a, Pack b) { return _mm512_div_ps(a.x, b.x); }
  friend DF_INLINE Mask operator>(Pack a, Pack b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ)}; }
  friend DF_INLINE Mask operator<=(Pack a, Pack b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_LE_OQ)}; }
  friend DF_INLINE Mask operator==(Pack a, Pack b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_EQ_OQ)}; }
  friend DF_INLINE Mask operator!=(Pack a, Pack b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_NEQ_UQ)}; }

  friend DF_INLINE Pack fma(Pack a, Pack b, Pack c) { return _mm512_fmadd_ps(a.x, b.x, c.x); }
  friend DF_INLINE Pack sqrt(Pack a) { return _mm512_sqrt_ps(a.x); }
  friend DF_INLINE Pack magnitude(Pack a) { return _mm512_abs_ps(a.x); }
  friend DF_INLINE Pack larger(Pack a, Pack b) { return _mm512_max_ps(a.x, b.x); }
  friend DF_INLINE Pack smaller(Pack a, Pack b) { return _mm512_min_ps(a.x, b.x); }
  friend DF_INLINE Pack select(Mask which, Pack yes, Pack no) { return _mm512_mask_mov_ps(no.x, which.x, yes.x); }
};

using Halves = __m256i;  // sixteen 16-bit values
using Words = __m512i;   // and 32-bit ones

DF_INLINE Pack load(const float* from, Pack) { return _mm512_loadu_ps(from); }
DF_INLINE Halves load(const uint16_t* from, Pack) { return _mm256_loadu_si256(reinterpret_cast<const Halves*>(from)); }
DF_INLINE void store(Pack a, float* to) { _mm512_storeu_ps(to, a.x); }
DF_INLINE void store(Halves h, uint16_t* to) { _mm256_storeu_si256(reinterpret_cast<Halves*>(to), h); }
DF_INLINE void store_past_caches(Halves h, uint16_t* to) { _mm256_stream_si256(reinterpret_cast<Halves*>(to), h); }
DF_INLINE void order_past_caches() { _mm_sfence(); }

// csrc/codec/half.h, sixteen at a time.

DF_INLINE Pack decode_fp16(Halves h) { return _mm512_cvtph_ps(h); }
DF_INLINE Pack decode_bf16(Halves h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
DF_INLINE Halves nearest_even_fp16(Pack a) { return _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT); }

// The upper half of each word. (By a permutation: GCC's own narrowing takes three times as long.)
DF_INLINE Halves upper(__m512i words) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_load_si512(kUpper), words));
}

// Of anything but NaN.
DF_INLINE Halves nearest_even_bf16(Pack a) {
  const __m512i bits = _mm512_castps_si512(a.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return upper(_mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd)));
}

// Of finite values.
DF_INLINE Halves half_away_bf16(Pack a) {
  return upper(_mm512_add_epi32(_mm512_castps_si512(a.x), _mm512_set1_epi32(0x8000)));
}

// csrc/codec/split.h, sixteen at a time; remainders of what does not saturate.

DF_INLINE Pack decode_split_bf16(Halves h, Halves remainder) {
  const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
  const __m512i bits = _mm512_add_epi32(upper, _mm512_cvtepi16_epi32(remainder));
  const __mmask16 crosses = _mm512_test_epi32_mask(_mm512_xor_si512(bits, upper), _mm512_set1_epi32(1 << 31));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, crosses, upper));
}

DF_INLINE Halves remainder_bf16(Pack a, Halves) {
  alignas(64) static constexpr uint16_t kLower[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_load_si512(kLower), _mm512_castps_si512(a.x)));
}

DF_INLINE Pack decode_split_fp16(Halves h, Halves remainder) {
  const Pack near = decode_fp16(h);
  const __m512i missing = _mm512_cvtepi16_epi32(remainder);
  const Pack normal = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(near.x), missing));
  const Pack below = fma(Pack(_mm512_cvtepi32_ps(missing)), Pack(-kUnitBelow), near);
  return select(Pack(kSmallestNormalFp16) > magnitude(near), below, normal);
}

DF_INLINE Halves remainder_fp16(Pack a, Halves h) {
  const Pack near = decode_fp16(h);
  const auto is_below = Pack(kSmallestNormalFp16) > magnitude(near);
  const __m512i below = _mm512_cvtps_epi32(((near - a) * Pack(1.0f / kUnitBelow)).x);
  const __m512i normal = _mm512_sub_epi32(_mm512_castps_si512(a.x), _mm512_castps_si512(near.x));
  return _mm512_cvtsepi32_epi16(_mm512_mask_mov_epi32(normal, is_below.x, below));
}

// csrc/codec/noise.h, of sixteen elements.
DF_INLINE Words bits_of(Noise noise, uint32_t i, Pack) {
  const auto mixed = [](__m512i x, int shift) { return _mm512_xor_si512(x, _mm512_srli_epi32(x, shift)); };
  const __m512i each = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i x = _mm512_add_epi32(each, _mm512_set1_epi32(i + noise.before));
  x = _mm512_mullo_epi32(mixed(x, 16), _mm512_set1_epi32(0x7feb352d));
  x = _mm512_xor_si512(mixed(x, 15), _mm512_set1_epi32(noise.between));
  return mixed(_mm512_mullo_epi32(x, _mm512_set1_epi32(0x846ca68bu)), 16);
}

DF_INLINE Words upper_half(Words words) { return _mm512_srli_epi32(words, 16); }

// Stochastic rounding of finite values; chance: sixteen bits in each word.
DF_INLINE Halves stochastic_bf16(Pack a, Words chance) {
  const __m512i bits = _mm512_castps_si512(a.x), sign = _mm512_and_si512(bits, _mm512_set1_epi32(1 << 31));
  const __m512i rounded = _mm512_add_epi32(_mm512_andnot_si512(sign, bits), chance);
  return upper(_mm512_or_si512(sign, _mm512_min_epu32(rounded, _mm512_set1_epi32(0x7f7fffff))));
}

DF_INLINE Halves stochastic_fp16(Pack a, Words chance) {
  const __m512i size = _mm512_castps_si512(magnitude(a).x);
  const __m512i exact = _mm512_sub_epi32(size, _mm512_set1_epi32(112 << 23));
  const __m512i normal = _mm512_srli_epi32(_mm512_add_epi32(exact, _mm512_srli_epi32(chance, 3)), 13);
  const __m512i units = _mm512_cvttps_epi32((magnitude(a) * Pack(1.0f / kUnitBelow)).x);
  const __m512i below = _mm512_srli_epi32(_mm512_add_epi32(units, chance), 16);
  const auto is_below = Pack(kSmallestNormalFp16) > magnitude(a);
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_min_epu32(normal, _mm512_set1_epi32(0x7bff)), is_below.x, below);
  const __m512i sign = _mm512_srli_epi32(_mm512_and_si512(_mm512_castps_si512(a.x), _mm512_set1_epi32(1 << 31)), 16);
  return _mm512_cvtepi32_epi16(_mm512_or_si512(rounded, sign));
}

}  // namespace deepfast::cpu
