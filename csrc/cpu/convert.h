// Blocks of 16-bit values to fp32 and back. The scalar codec says what is meant; where the instruction set converts
// fp16 in hardware, that is used (GCC vectorizes bf16's shifts by itself, but no loop over fp16).
#pragma once

#include "../codec/half.h"
#include "../span.h"
#include "strips.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace deepfast::cpu {

// dst[n] = src[n]
inline void decode_fp16(const uint16_t* __restrict src, float* __restrict dst, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    if (i % kStrip == 0) ask_ahead(src + i);
    _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i))));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    if (i % kStrip == 0) ask_ahead(src + i);
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
#endif
  for (; i < n; ++i) dst[i] = Fp16::decode(src[i]);
}

#if defined(__AVX512F__)
// Fp16::saturate, 16 at a time: min and max return their second operand for NaN, so NaN stays; infinity is put back.
inline __m512 saturate_fp16(__m512 x) {
  const __m512 largest = _mm512_set1_ps(65504.0f), smallest = _mm512_set1_ps(-65504.0f);
  const __mmask16 infinite = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(INFINITY), _CMP_EQ_OQ);
  return _mm512_mask_mov_ps(_mm512_min_ps(largest, _mm512_max_ps(smallest, x)), infinite, x);
}
#endif

// dst[n] = src[n] rounded half to even; kSaturate: by the rule for weights with a master.
template <bool kSaturate>
inline void encode_fp16(const float* __restrict src, uint16_t* __restrict dst, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    __m512 x = _mm512_loadu_ps(src + i);
    if constexpr (kSaturate) x = saturate_fp16(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  alignas(32) float staged[8];
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) staged[j] = kSaturate ? Fp16::saturate(src[i + j]) : src[i + j];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_load_ps(staged), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; ++i) dst[i] = kSaturate ? Fp16::from_master(src[i]) : Fp16::nearest_even(src[i]);
}

#if defined(__AVX512F__)
// Bf16::nearest_even, 16 at a time, in the upper half of each word.
inline __m512i rounded_to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), even));
  return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
}
#endif

// dst[n] = src[n] rounded half to even.
inline void encode_bf16(const float* __restrict src, uint16_t* __restrict dst, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  alignas(64) uint16_t upper[32];  // GCC narrows by an instruction that takes three times as long
  for (int k = 0; k < 32; ++k) upper[k] = 2 * k + 1;
  const __m512i uppers = _mm512_load_si512(upper);
  for (; i + 32 <= n; i += 32) {
    const __m512i a = rounded_to_bf16(_mm512_loadu_ps(src + i)), b = rounded_to_bf16(_mm512_loadu_ps(src + i + 16));
    _mm512_storeu_si512(dst + i, _mm512_permutex2var_epi16(a, uppers, b));
  }
#endif
  for (; i < n; ++i) dst[i] = Bf16::nearest_even(src[i]);
}

#if defined(__AVX512F__)
// 32 16-bit values as fp32. Of bf16 first the even ones, then the odd: so no value has to change its place.
struct Wide {
  __m512 a, b;
};

template <DType kType>
inline Wide widened(const uint16_t* src) {
  if constexpr (kType == DType::kFloat16) {
    const __m256i* half = reinterpret_cast<const __m256i*>(src);
    return {_mm512_cvtph_ps(_mm256_loadu_si256(half)), _mm512_cvtph_ps(_mm256_loadu_si256(half + 1))};
  }
  const __m512i x = _mm512_loadu_si512(src);
  const __m512i odd = _mm512_and_si512(x, _mm512_set1_epi32(0xffff0000));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(odd)};
}

// Back, rounded half to even.
template <DType kType>
inline __m512i narrowed(const Wide& x) {
  if constexpr (kType == DType::kFloat16) {
    const __m512i lower = _mm512_castsi256_si512(_mm512_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    return _mm512_inserti64x4(lower, _mm512_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT), 1);
  }
  const __m512i even = _mm512_srli_epi32(rounded_to_bf16(x.a), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded_to_bf16(x.b));
}
#endif

// The block as fp32: in place where it is fp32 already, else decoded into `staging`.
inline const float* decode(const void* src, DType dtype, int64_t offset, int64_t n, float* __restrict staging) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(src) + offset;
  const uint16_t* __restrict half = static_cast<const uint16_t*>(src) + offset;
  if (dtype == DType::kFloat16) {
    decode_fp16(half, staging, n);
  } else {
    for_each(n, [=](int64_t i) { staging[i] = Bf16::decode(half[i]); }, half);
  }
  return staging;
}

// dst[n] = src[n] past the caches. A plain store would read the line first, and evict what the step still needs.
inline void stream(const uint16_t* __restrict src, uint16_t* __restrict dst, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i < n && reinterpret_cast<uintptr_t>(dst + i) % 32 != 0; ++i) dst[i] = src[i];
  for (; i + 16 <= n; i += 16) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
  }
  _mm_sfence();  // such stores are ordered with nothing; whoever reads the weights next waits for a barrier only
#endif
  for (; i < n; ++i) dst[i] = src[i];
}

// Stores fp32 `src` as `dtype` (16 bits wide). master: by the rule for weights with a master, else torch's.
inline void encode(const float* __restrict src, void* dst, DType dtype, int64_t offset, int64_t n, bool master) {
  uint16_t* __restrict half = static_cast<uint16_t*>(dst) + offset;
  if (dtype == DType::kFloat16) {
    master ? encode_fp16<true>(src, half, n) : encode_fp16<false>(src, half, n);
  } else if (master) {
    for (int64_t i = 0; i < n; ++i) half[i] = Bf16::from_master(src[i]);
  } else {
    encode_bf16(src, half, n);
  }
}

}  // namespace deepfast::cpu
