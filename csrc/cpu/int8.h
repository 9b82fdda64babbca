// Moments in 8 bits: a stretch of a span is decoded into the first cache, walked there like any other, and encoded
// again when all of a group's new values are known.
#pragma once

#include <algorithm>

#include "strips.h"

namespace deepfast::cpu {

// What a Pack's functions do, for one float.
DF_INLINE uint8_t load(const uint8_t* from, float) { return *from; }
DF_INLINE void store(uint8_t code, uint8_t* to) { *to = code; }
template <bool kSigned>
DF_INLINE float decode(const Int8<kSigned>& form, uint8_t code) {
  return form.decode(code);
}
template <bool kSigned>
DF_INLINE uint8_t encode(const Int8<kSigned>& form, float x, uint32_t chance) {
  return form.encode(x, chance);
}
DF_INLINE uint32_t bits_of(Dither dither, uint32_t i, float) { return dither.bits(i); }
DF_INLINE uint32_t size_bits(float x) { return to_bits(magnitude(x)); }
DF_INLINE uint32_t negative(uint32_t words) { return 0u - words; }
DF_INLINE uint32_t greater(uint32_t a, uint32_t b) { return a > b ? a : b; }
DF_INLINE uint32_t greatest_of(uint32_t words) { return words; }

// Groups of a moment, from one on.
struct Groups {
  uint8_t* codes;
  uint16_t* words;

  // first: an element with which a group begins.
  static Groups of(void* moment, int64_t numel, int64_t first) {
    auto* codes = static_cast<uint8_t*>(moment);
    return {codes + first, words_of(codes, numel) + first / kGroup};
  }

  // count groups, to or from fp32. What a short one lacks is zeros, and has no say in its word.
  template <bool kSigned>
  void decode_to(float* to, int64_t count) const {
    for (int64_t group = 0; group < count; ++group) {
      __builtin_prefetch(codes + (group + kAhead) * kGroup);
      const auto form = Int8<kSigned>::of(words[group]);
      for (int64_t i = group * kGroup; i < (group + 1) * kGroup; i += kWidth<Pack>) {
        store(decode(form, load(codes + i, Pack())), to + i);
      }
    }
  }

  // count <= kMost groups. first: which element of the whole parameter the first one is. (Pass after pass: a group's
  // word comes late, and others have work to do until it is there.)
  template <bool kSigned>
  void encode_from(const float* from, int64_t count, Dither dither, uint32_t first) const {
    uint32_t sizes[kMost], least[kMost] = {};
    for (int64_t group = 0; group < count; ++group) {
      const float* values = from + group * kGroup;
      auto greatest = size_bits(load(values, Pack())), negated = negative(greatest);
      for (int64_t i = kWidth<Pack>; i < kGroup; i += kWidth<Pack>) {
        const auto size = size_bits(load(values + i, Pack()));
        greatest = greater(greatest, size);
        if constexpr (!kSigned) negated = greater(negated, negative(size));
      }
      sizes[group] = greatest_of(greatest);
      if constexpr (!kSigned) least[group] = greatest_of(negated);
    }
    for (int64_t group = 0; group < count; ++group) {
      words[group] = Int8<kSigned>::word_of(sizes[group], least[group]);
    }
    uint8_t* const to = codes;  // a byte that is stored could be any, those of a member, too
    for (int64_t group = 0; group < count; ++group) {
      const auto form = Int8<kSigned>::of(words[group]);
      for (int64_t i = group * kGroup; i < (group + 1) * kGroup; i += kWidth<Pack>) {
        const auto chance = bits_of(dither, first + static_cast<uint32_t>(i), Pack());
        store(encode(form, load(from + i, Pack()), chance), to + i);
      }
    }
  }

  static constexpr int64_t kMost = 16;

 private:
  static constexpr int64_t kAhead = 16;  // groups
};

inline bool has_grouped(const Span& span, int moments) {
  return std::any_of(span.moment_dtype, span.moment_dtype + moments, is_grouped);
}

constexpr int64_t kStretch = Groups::kMost * kGroup;
constexpr int64_t kStagger = 272;  // floats: two stretches do not begin at the same place in a page

// body(seen, begin, n) for the elements [begin, begin + n) of `span`, a stretch at a time where some of its moments are
// grouped: `seen` is the span with those in fp32. kWrites: they are encoded afterwards. ahead: how many steps later
// than it is now the step count is by which chance is drawn.
template <int kMoments, bool kWrites, class Body>
void with_decoded(const Span& span, int64_t begin, int64_t n, float ahead, const Body& body) {
  if constexpr (kMoments == 0) {
    body(span, begin, n);
  } else {
    alignas(64) float place[kMoments][kStretch + kStagger];
    const bool grouped = has_grouped(span, kMoments);
    const uint64_t step = grouped ? static_cast<uint64_t>(*span.step + ahead) : 0;
    const int64_t stretch = grouped ? kStretch : n;
    for (int64_t offset = begin; offset < begin + n; offset += stretch) {
      const int64_t some = std::min(stretch, begin + n - offset), count = groups_of(some);
      const auto each = [&](const auto& call) {
        for (int k = 0; grouped && k < kMoments; ++k) {
          if (!is_grouped(span.moment_dtype[k])) continue;
          const Groups groups = Groups::of(span.moment[k], span.numel, offset);
          span.moment_dtype[k] == DType::kInt8 ? call.template operator()<true>(k, groups)
                                               : call.template operator()<false>(k, groups);
        }
      };
      Span seen = span;
      each([&]<bool kSigned>(int k, const Groups& groups) {
        groups.decode_to<kSigned>(place[k], count);
        seen.moment[k] = place[k] - offset;
        seen.moment_dtype[k] = DType::kFloat32;
      });
      body(seen, offset, some);
      if constexpr (kWrites) {
        each([&]<bool kSigned>(int k, const Groups& groups) {
          const Dither dither = Dither::of(span.seed, step, k);
          groups.encode_from<kSigned>(place[k], count, dither, static_cast<uint32_t>(span.first + offset));
        });
      }
    }
  }
}

}  // namespace deepfast::cpu
