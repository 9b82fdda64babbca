// fp16 and bf16 as bit patterns: how a value is stored, never what it means. Load decodes to fp32, store encodes.
//
// Three rules of rounding. `nearest_even` is torch's and overflows to infinity. `from_master` is for a weight whose
// fp32 value is kept elsewhere: it saturates at the largest finite value, and bf16 rounds half away from zero, so that
// a 16-bit remainder can represent the difference exactly (round-half-even cannot: an even bf16 has 65,537 fp32
// preimages). `stochastic` is for a weight without one: up or down by chance, saturating, right on average. Infinities
// and NaN stay what they are under all.
#pragma once

#include "../math/numeric.h"

namespace deepfast {

constexpr uint32_t kSign = 0x80000000u;
constexpr uint32_t kInfinity = 0x7f800000u;

struct Fp16 {
  static constexpr float kLargest = 65504.0f;

  static DF_INLINE float decode(uint16_t h) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
#else
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // inf, NaN (made quiet, as the hardware does)
      return from_bits(sign | kInfinity | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x00400000u : 0u));
    }
    if (magnitude < 0x0400u) {  // zero, subnormal: an exact product
      return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24f));
    }
    return from_bits(sign | ((magnitude << 13) + (112u << 23)));
#endif
  }

  static DF_INLINE uint16_t nearest_even(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
#else
    const uint32_t sign = (to_bits(x) & kSign) >> 16, magnitude = to_bits(x) & ~kSign;
    if (magnitude > kInfinity) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on
    if (magnitude < 0x38800000u) {  // below 2^-14: let an fp32 addition at ulp 2^-24 round
      return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
#endif
  }

  static DF_INLINE uint16_t from_master(float x) { return nearest_even(cut(x, kLargest)); }

  // Up with the probability that makes it right on average; chance: 16 random bits.
  static DF_INLINE uint16_t stochastic(float x, uint32_t chance) {
    const uint32_t sign = (to_bits(x) & kSign) >> 16, magnitude = to_bits(x) & ~kSign;
    if (!(magnitude < kInfinity)) return nearest_even(x);
    if (magnitude >= 0x38800000u) {
      const uint32_t rounded = (magnitude - (112u << 23) + (chance >> 3)) >> 13;
      return static_cast<uint16_t>(sign | (rounded > 0x7bffu ? 0x7bffu : rounded));
    }
    const uint32_t units = static_cast<uint32_t>(from_bits(magnitude) * 0x1p40f);  // the last place is 2^-24
    return static_cast<uint16_t>(sign | ((units + chance) >> 16));
  }
};

struct Bf16 {
  static constexpr float kLargest = 0x1.fep127f;

  static DF_INLINE float decode(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

  static DF_INLINE uint16_t nearest_even(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & ~kSign) > kInfinity ? (bits >> 16) | 0x40u : rounded);
  }

  static DF_INLINE uint16_t from_master(float x) {
    const uint32_t bits = to_bits(x);
    return (bits & ~kSign) > kInfinity ? static_cast<uint16_t>((bits >> 16) | 0x40u) : half_away(cut(x, kLargest));
  }

  static DF_INLINE uint16_t stochastic(float x, uint32_t chance) {
    const uint32_t sign = (to_bits(x) & kSign) >> 16, magnitude = to_bits(x) & ~kSign;
    if (!(magnitude < kInfinity)) return nearest_even(x);
    const uint32_t rounded = (magnitude + chance) >> 16;
    return static_cast<uint16_t>(sign | (rounded > 0x7f7fu ? 0x7f7fu : rounded));
  }

  // Of anything but NaN, and without the limit.
  static DF_INLINE uint16_t half_away(float x) { return static_cast<uint16_t>((to_bits(x) + 0x8000u) >> 16); }
};

}  // namespace deepfast
