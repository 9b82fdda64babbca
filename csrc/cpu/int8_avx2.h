// csrc/codec/int8.h, eight at a time.
#pragma once

#include "../codec/int8.h"
#include "pack_avx2.h"

namespace deepfast::cpu {

struct Codes {
  __m128i x;  // eight, in the lower half
};

DF_INLINE Codes load(const uint8_t* from, Pack) { return {_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))}; }
DF_INLINE void store(Codes codes, uint8_t* to) { _mm_storel_epi64(reinterpret_cast<__m128i*>(to), codes.x); }

DF_INLINE Words size_bits(Pack a) { return _mm256_castps_si256(magnitude(a).x); }
DF_INLINE Words negative(Words a) { return _mm256_sub_epi32(_mm256_setzero_si256(), a); }
DF_INLINE Words greater(Words a, Words b) { return _mm256_max_epu32(a, b); }

DF_INLINE uint32_t greatest_of(Words a) {
  __m128i x = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4e));
  x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(x));
}

// The lowest byte of each word; what is more than 255 becomes that.
DF_INLINE Codes narrowed(Words c) {
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
  return {_mm_packus_epi16(halves, halves)};
}

template <bool kSigned>
DF_INLINE Pack decode(const Int8<kSigned>& form, Codes codes) {
  const Words c = _mm256_cvtepu8_epi32(codes.x), bias = _mm256_set1_epi32(form.bias);
  if constexpr (kSigned) {
    const Words steps = _mm256_slli_epi32(_mm256_and_si256(c, _mm256_set1_epi32(127)), 20);
    const Pack size = Pack(_mm256_castsi256_ps(_mm256_add_epi32(steps, bias))) - Pack(form.floor());
    const Words sign = _mm256_slli_epi32(_mm256_srli_epi32(c, 7), 31);
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_castps_si256(size.x), sign));
  } else {
    const Words value = _mm256_add_epi32(_mm256_sll_epi32(c, _mm_cvtsi32_si128(form.shift)), bias);
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpeq_epi32(c, _mm256_setzero_si256()), value));
  }
}

template <bool kSigned>
DF_INLINE Codes encode(const Int8<kSigned>& form, Pack x, Words chance) {
  const Words bias = _mm256_set1_epi32(form.bias);
  if constexpr (kSigned) {
    const Words b = _mm256_castps_si256((magnitude(x) + Pack(form.floor())).x);
    const Words steps = _mm256_add_epi32(_mm256_sub_epi32(b, bias), _mm256_srli_epi32(chance, 12));
    const Words c = _mm256_min_epi32(_mm256_srli_epi32(steps, 20), _mm256_set1_epi32(Int8<kSigned>::kMost));
    const Words sign = _mm256_slli_epi32(_mm256_srli_epi32(_mm256_castps_si256(x.x), 31), 7);
    return narrowed(_mm256_or_si256(c, sign));
  } else {
    const Words b = size_bits(x), share = _mm256_srl_epi32(chance, _mm_cvtsi32_si128(32 - form.shift));
    const Words steps = _mm256_add_epi32(_mm256_sub_epi32(b, bias), share);
    const Words c = _mm256_max_epi32(_mm256_sra_epi32(steps, _mm_cvtsi32_si128(form.shift)), _mm256_set1_epi32(1));
    return narrowed(_mm256_andnot_si256(_mm256_cmpeq_epi32(b, _mm256_setzero_si256()), c));
  }
}

// csrc/codec/noise.h, of eight elements.
DF_INLINE Words bits_of(Dither dither, uint32_t i, Pack) {
  const __m256i each = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const Words apart = _mm256_mullo_epi32(each, _mm256_set1_epi32(static_cast<int>(Dither::kApart)));
  return _mm256_add_epi32(apart, _mm256_set1_epi32(static_cast<int>(dither.bits(i))));
}

}  // namespace deepfast::cpu
