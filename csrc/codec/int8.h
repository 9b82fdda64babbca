// Moments in 8 bits: a byte an element, and a 16-bit word for each group of 64 with the scale that they have in common.
//
// A group is kGroup consecutive elements of one parameter, counted from its element 0; the last may be short. Its word
// is least << 4 | width. Codes are even steps in the fp32 pattern, which is nearly the logarithm (arXiv:2505.00347
// finds that right for second moments); `least`, the pattern's upper 12 bits of the smallest code, cannot underflow.
//
//   signed        sign << 7 | c: the value of the pattern (least << 20) + (c << 20), less that of least << 20. 3 bits
//   of
//                 mantissa over the 16 octaves below the group's greatest, even steps near zero. width is 8.
//   non-negative  c > 0: the value of the pattern (least << 20) + (c - 1 << shift), shift = 12 + width. 0: zero, and no
//                 other value. From 3 bits of mantissa (32 octaves; what is less is raised) up to 11 where the group's
//                 least non-zero value and its greatest lie close.
//
// Rounding is stochastic: nearest would give back the stored code whenever a moving average moves by less than half a
// step (beta2 = 0.999: always). Each element sees a fresh, even, independent value each step (noise.h), so that a
// moving average is on average what fp32 would make of it.
//
// Infinities and NaN stay what they are. Their group's other elements are lost: signed makes them 0 (below 2^109),
// non-negative at least 2^97. Finite values are cut to 1.875 * 2^127; below 2^-126 the one rounds to 0 or to that, the
// other raises.
#pragma once

#include "noise.h"

namespace deepfast {

constexpr int kGroup = 64;

// A moment of `numel` elements as it is stored: the codes, whole groups of them, then the groups' words.
DF_INLINE int64_t groups_of(int64_t numel) { return (numel + kGroup - 1) / kGroup; }
DF_INLINE int64_t packed_bytes(int64_t numel) { return groups_of(numel) * (kGroup + 2); }
DF_INLINE uint16_t* words_of(uint8_t* codes, int64_t numel) {
  return reinterpret_cast<uint16_t*>(codes + groups_of(numel) * kGroup);
}

template <bool kSigned>
struct Int8 {
  static constexpr int32_t kMost = kSigned ? 127 : 255;

  int32_t shift, bias;  // a code's pattern: (c << shift) + bias; of the signed, bias is also the pattern of `floor`

  static DF_INLINE Int8 of(uint16_t word) {
    const int32_t least = static_cast<int32_t>(word >> 4) << 20;
    if constexpr (kSigned) return {20, least};
    const int32_t shift = 12 + (word & 15);
    return {shift, least - (1 << shift)};
  }

  // The word of a group. greatest: its magnitudes' greatest pattern; negated: minus the least that is not zero's (0
  // where there is none), asked of the non-negative only.
  static DF_INLINE uint16_t word_of(uint32_t greatest, uint32_t negated) {
    const int32_t rounded = static_cast<int32_t>((greatest + (kSigned ? 0x100000u : 0xfffffu)) >> 20);
    const int32_t top = greatest >= 0x7f800000u ? 0x7f9 : rounded < 0x7f7 ? rounded : 0x7f7;
    if constexpr (kSigned) {
      const int32_t least = top - 127 > 8 ? top - 127 : 8;
      return static_cast<uint16_t>(least << 4 | 8);
    }
    const bool huge = greatest > 0x7f700000u;  // then 255 must be top itself: what lies beyond is cut to it
    const int32_t smallest = huge ? 0 : static_cast<int32_t>((0u - negated) >> 20);
    int32_t least = smallest > top - 254 ? smallest : top - 254;
    least = least > 1 ? least : 1;
    const int32_t length = static_cast<int32_t>(to_bits(static_cast<float>(top - least)) >> 23) - 126;
    return static_cast<uint16_t>(least << 4 | (top > least ? length : 0));  // length in bits of top - least
  }

  DF_INLINE float decode(uint8_t code) const {
    if constexpr (kSigned) {
      const float size = from_bits((static_cast<uint32_t>(code & 127u) << 20) + static_cast<uint32_t>(bias)) - floor();
      return from_bits(to_bits(size) | static_cast<uint32_t>(code & 0x80u) << 24);
    } else {
      return from_bits(code == 0 ? 0u : (static_cast<uint32_t>(code) << shift) + static_cast<uint32_t>(bias));
    }
  }

  // chance: 32 random bits. Needs the group's own word.
  DF_INLINE uint8_t encode(float x, uint32_t chance) const {
    const uint32_t b = to_bits(kSigned ? magnitude(x) + floor() : x) & 0x7fffffffu;
    int32_t c = static_cast<int32_t>(b + (chance >> (32 - shift)) - static_cast<uint32_t>(bias)) >> shift;
    c = c < kMost ? c : kMost;
    if constexpr (kSigned) return static_cast<uint8_t>(static_cast<uint32_t>(c) | (to_bits(x) >> 31) << 7);
    return static_cast<uint8_t>(b == 0 ? 0 : c > 1 ? c : 1);
  }

  DF_INLINE float floor() const { return from_bits(static_cast<uint32_t>(bias)); }
};

}  // namespace deepfast
