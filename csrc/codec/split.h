// A master in two bytes: an fp32 weight is its 16-bit parameter, rounded by from_master, and an int16 with what that
// lacks.
//
// bf16 has the upper half of the word, rounded half away from zero, so the lower half as a signed number is all that is
// missing: exact up to where rounding saturates. Beside an fp16 of 2^-14 or more the int16 counts units in fp32's last
// place, of which rounding takes at most 2^12 (2^13 from below 2^-14): exact up to 65504 and a little further. Below,
// it counts downwards in 2^-40 (downwards, so that a negative zero stays one): exact from 2^-17 on, and nowhere off by
// more than 2^-40.
#pragma once

#include "half.h"

namespace deepfast {

constexpr float kSmallestNormalFp16 = 0x1p-14f;
constexpr float kUnitBelow = 0x1p-40f;

struct SplitBf16 {
  // A zero that somebody has written over a weight may have anything beside it.
  static DF_INLINE float decode(uint16_t h, int16_t remainder) {
    const uint32_t upper = static_cast<uint32_t>(h) << 16, bits = upper + static_cast<int32_t>(remainder);
    return from_bits((bits ^ upper) & kSign ? upper : bits);
  }

  // h: from_master(x)
  static DF_INLINE int16_t remainder(float x, uint16_t h) {
    if (!(magnitude(x) <= FLT_MAX)) return 0;
    const uint32_t missing = to_bits(x) - (static_cast<uint32_t>(h) << 16);
    return static_cast<int16_t>(static_cast<int32_t>(missing) > 0x7fff ? 0x7fff : missing);
  }
};

struct SplitFp16 {
  static DF_INLINE float decode(uint16_t h, int16_t remainder) {
    const float near = Fp16::decode(h);
    if (magnitude(near) < kSmallestNormalFp16) return fma(static_cast<float>(remainder), -kUnitBelow, near);
    return from_bits(to_bits(near) + static_cast<int32_t>(remainder));
  }

  // h: from_master(x)
  static DF_INLINE int16_t remainder(float x, uint16_t h) {
    if (!(magnitude(x) <= FLT_MAX)) return 0;
    const float near = Fp16::decode(h);
    int32_t missing = static_cast<int32_t>(to_bits(x) - to_bits(near));
    if (magnitude(near) < kSmallestNormalFp16) {
      constexpr float kWhole = 0x1.8p23f;  // added to a small number, it leaves the nearest integer in the last bits
      missing = static_cast<int32_t>(to_bits((near - x) * (1.0f / kUnitBelow) + kWhole) - to_bits(kWhole));
    }
    return static_cast<int16_t>(missing > 0x7fff ? 0x7fff : missing);
  }
};

}  // namespace deepfast
