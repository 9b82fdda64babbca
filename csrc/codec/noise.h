// Random bits that are a function of where and when: no generator has a state that somebody would have to keep, share
// or capture. The same element of the same parameter at the same step has the same ones, on any backend and any rank.
#pragma once

#include "../math/numeric.h"

namespace deepfast {

// Of one parameter at one step.
struct Noise {
  uint32_t before, between;

  // seed: the parameter's. (The finalizer of splitmix64, Steele, Lea & Flood 2014.)
  static DF_INLINE Noise of(uint64_t seed, uint64_t step) {
    uint64_t x = seed + step * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return {static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32)};
  }

  // Of element i of the whole parameter: 32 bits. (Two rounds of multiplication and shift with the constants of
  // Wellons' lowbias32; half of the key comes in between, so that no two steps' bits are the same ones moved along.)
  DF_INLINE uint32_t bits(uint32_t i) const {
    uint32_t x = i + before;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15) ^ between) * 0x846ca68bu;
    return x ^ (x >> 16);
  }
};

// Of one moment of a parameter at one step: cheaper bits, for there are more of them. The elements' are evenly spread,
// not independent of each other; an element's are from step to step.
struct Dither {
  static constexpr uint32_t kApart = 0x9e3779b9u;
  uint32_t key;

  static DF_INLINE Dither of(uint64_t seed, uint64_t step, int moment) {
    return {Noise::of(seed + (moment + 1) * 0xe7037ed1a0b428dbu, step).before};
  }

  // Of element i of the whole parameter.
  DF_INLINE uint32_t bits(uint32_t i) const { return key + i * kApart; }
};

}  // namespace deepfast
