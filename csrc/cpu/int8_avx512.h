// csrc/codec/int8.h, sixteen at a time.
#pragma once

#include "../codec/int8.h"
#include "pack_avx512.h"

namespace deepfast::cpu {

using Codes = __m128i;  // sixteen

DF_INLINE Codes load(const uint8_t* from, Pack) { return _mm_loadu_si128(reinterpret_cast<const Codes*>(from)); }
DF_INLINE void store(Codes codes, uint8_t* to) { _mm_storeu_si128(reinterpret_cast<Codes*>(to), codes); }

DF_INLINE Words size_bits(Pack a) { return _mm512_castps_si512(magnitude(a).x); }
DF_INLINE Words negative(Words a) { return _mm512_sub_epi32(_mm512_setzero_si512(), a); }
DF_INLINE Words greater(Words a, Words b) { return _mm512_max_epu32(a, b); }
DF_INLINE uint32_t greatest_of(Words a) { return _mm512_reduce_max_epu32(a); }

// a | (b & c)
DF_INLINE Words with_bits(Words a, Words b, uint32_t c) {
  return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32(static_cast<int>(c)), 0xf8);
}

template <bool kSigned>
DF_INLINE Pack decode(const Int8<kSigned>& form, Codes codes) {
  const Words c = _mm512_cvtepu8_epi32(codes), bias = _mm512_set1_epi32(form.bias);
  if constexpr (kSigned) {
    const Words steps = _mm512_slli_epi32(_mm512_and_si512(c, _mm512_set1_epi32(127)), 20);
    const Pack size = Pack(_mm512_castsi512_ps(_mm512_add_epi32(steps, bias))) - Pack(form.floor());
    return _mm512_castsi512_ps(with_bits(_mm512_castps_si512(size.x), _mm512_slli_epi32(c, 24), kSign));
  } else {
    const Words steps = _mm512_sll_epi32(c, _mm_cvtsi32_si128(form.shift));
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(_mm512_test_epi32_mask(c, c), steps, bias));
  }
}

template <bool kSigned>
DF_INLINE Codes encode(const Int8<kSigned>& form, Pack x, Words chance) {
  const Words bias = _mm512_set1_epi32(form.bias);
  if constexpr (kSigned) {
    const Words b = _mm512_castps_si512((magnitude(x) + Pack(form.floor())).x);
    const Words steps = _mm512_add_epi32(_mm512_sub_epi32(b, bias), _mm512_srli_epi32(chance, 12));
    const Words c = _mm512_min_epi32(_mm512_srli_epi32(steps, 20), _mm512_set1_epi32(Int8<kSigned>::kMost));
    return _mm512_cvtepi32_epi8(with_bits(c, _mm512_srli_epi32(_mm512_castps_si512(x.x), 24), 0x80));
  } else {
    const Words b = size_bits(x), share = _mm512_srl_epi32(chance, _mm_cvtsi32_si128(32 - form.shift));
    const Words steps = _mm512_add_epi32(_mm512_sub_epi32(b, bias), share);
    const Words c = _mm512_sra_epi32(steps, _mm_cvtsi32_si128(form.shift));
    const Words some = _mm512_maskz_max_epi32(_mm512_test_epi32_mask(b, b), c, _mm512_set1_epi32(1));
    return _mm512_cvtusepi32_epi8(some);
  }
}

// csrc/codec/noise.h, of sixteen elements.
DF_INLINE Words bits_of(Dither dither, uint32_t i, Pack) {
  const __m512i each = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const Words apart = _mm512_mullo_epi32(each, _mm512_set1_epi32(static_cast<int>(Dither::kApart)));
  return _mm512_add_epi32(apart, _mm512_set1_epi32(static_cast<int>(dither.bits(i))));
}

}  // namespace deepfast::cpu
