// What a step reads and writes of a span, register by register, with as much of its types as is known when the loop is
// compiled.
#pragma once

#include <algorithm>
#include <array>
#include <tuple>

#include "strips.h"

namespace deepfast::cpu {

// The types of a span's weight and gradient, so far as they are known when a loop is compiled: both fp32; both the same
// 16-bit one, with an fp32 master, a split one or none; or any.
enum class Types { kFp32, kFp16, kBf16, kSplitFp16, kSplitBf16, kAloneFp16, kAloneBf16, kAny };

inline Types types_of(const Span& span) {
  if (span.param_dtype != span.grad_dtype) return Types::kAny;
  if (span.param_dtype == DType::kFloat32) return span.master ? Types::kAny : Types::kFp32;
  const bool fp16 = span.param_dtype == DType::kFloat16;
  if (!span.master) return fp16 ? Types::kAloneFp16 : Types::kAloneBf16;
  if (span.has_split()) return fp16 ? Types::kSplitFp16 : Types::kSplitBf16;
  return fp16 ? Types::kFp16 : Types::kBf16;
}

inline bool all_moments(const Span& span, int moments, DType dtype) {
  return std::all_of(span.moment_dtype, span.moment_dtype + moments, [=](DType own) { return own == dtype; });
}

// What a rule reads and writes of a span. kMoments: the type of all moments, where it is known.
template <class Rule, Types kTypes, DType kMoments = DType::kFloat32>
class Streams {
  static constexpr bool kAny = kTypes == Types::kAny;
  static constexpr bool kSplit = kTypes == Types::kSplitFp16 || kTypes == Types::kSplitBf16;
  static constexpr bool kAlone = kTypes == Types::kFp32 || kTypes == Types::kAloneFp16 || kTypes == Types::kAloneBf16;
  static constexpr bool kIsFp16 = kTypes == Types::kFp16 || kTypes == Types::kSplitFp16 || kTypes == Types::kAloneFp16;
  static constexpr DType kKnown = kTypes == Types::kFp32 ? DType::kFloat32
                                  : kIsFp16              ? DType::kFloat16
                                                         : DType::kBFloat16;

 public:
  explicit Streams(const Span& span)
      : grad_(span.grad),
        weight_(span.master && !span.has_split() ? span.master : span.param),
        half_(span.master && span.param_dtype != DType::kFloat32 ? static_cast<uint16_t*>(span.param) : nullptr),
        remainder_(span.has_split() ? static_cast<uint16_t*>(span.master) : nullptr),
        param_(span.param_dtype),
        grad_type_(span.grad_dtype),
        by_chance_(span.rounding == Rounding::kStochastic),
        noise_(Noise::of(span.seed, span.step ? static_cast<uint64_t>(*span.step) : 0)),
        first_(static_cast<uint32_t>(span.first)) {
    for (int k = 0; k < Rule::kMoments; ++k) {
      moment_[k] = span.moment[k];
      moment_type_[k] = span.moment_dtype[k];
    }
  }

  template <class V>
  struct Loaded {
    V p, g = 0.0f;
    std::array<V, Rule::kMoments> moment;
  };

  template <bool kGrad, class V>
  DF_INLINE Loaded<V> load(int64_t i, V v) const {
    Loaded<V> x;
    x.p = has_split() ? decode_split(cpu::load(half_ + i, v), cpu::load(remainder_ + i, v), param_dtype())
                      : cpu::load<V>(weight_, weight_dtype(), i);
    if constexpr (kGrad) x.g = cpu::load<V>(grad_, grad_dtype(), i);
    for (int k = 0; k < Rule::kMoments; ++k) x.moment[k] = cpu::load<V>(moment_[k], moment_dtype(k), i);
    return x;
  }

  template <class V>
  DF_INLINE void store_moments(const Loaded<V>& x, int64_t i) const {
    for (int k = 0; k < Rule::kMoments; ++k) store(x.moment[k], moment_[k], moment_dtype(k), i);
  }

  // Whether what is stored of a moment can differ from it.
  bool rounds_moments() const {
    for (int k = 0; k < Rule::kMoments; ++k) {
      if (moment_dtype(k) != DType::kFloat32) return true;
    }
    return false;
  }

  template <class V>
  DF_INLINE void store_weight(V p, int64_t i, bool past_caches) const {
    if (!has_master() && param_dtype() != DType::kFloat32 && by_chance_) {
      const auto rounded = stochastic(p, noise_, first_ + static_cast<uint32_t>(i), param_dtype());
      return store(rounded, static_cast<uint16_t*>(weight_) + i);
    }
    if (!has_master()) return store(p, weight_, weight_dtype(), i);
    const auto rounded = from_master(p, param_dtype());
    if (has_split()) {  // both have been read: they are in the caches
      store(remainder(p, rounded, param_dtype()), remainder_ + i);
      store(rounded, half_ + i);
      return;
    }
    store(p, weight_, DType::kFloat32, i);
    past_caches ? store_past_caches(rounded, half_ + i) : store(rounded, half_ + i);
  }

  template <bool kGrad>
  DF_INLINE void ask_ahead(int64_t i) const {
    cpu::ask_ahead(weight_, weight_dtype(), i, ahead_);
    if (has_split()) cpu::ask_ahead(remainder_, DType::kInt16, i, ahead_);
    if constexpr (kGrad) cpu::ask_ahead(grad_, grad_dtype(), i, ahead_);
    for (int k = 0; k < Rule::kMoments; ++k) cpu::ask_ahead(moment_[k], moment_dtype(k), i, ahead_);
  }

  // Whether the halves lie as a store past the caches needs it.
  bool aligned() const { return reinterpret_cast<uintptr_t>(half_) % (2 * kWidth<Pack>) == 0; }

 private:
  DF_INLINE bool has_master() const { return kAny ? half_ != nullptr : !kAlone; }
  DF_INLINE bool has_split() const { return kAny ? remainder_ != nullptr : kSplit; }
  DF_INLINE DType param_dtype() const { return kAny ? param_ : kKnown; }
  DF_INLINE DType grad_dtype() const { return kAny ? grad_type_ : kKnown; }
  DF_INLINE DType weight_dtype() const { return has_master() && !has_split() ? DType::kFloat32 : param_dtype(); }
  DF_INLINE DType moment_dtype(int k) const { return kAny ? moment_type_[k] : kMoments; }

  const void* grad_;
  void* weight_;         // the fp32 master where there is one
  uint16_t* half_;       // the parameter where it has a master and is 16 bits wide
  uint16_t* remainder_;  // what it lacks where the master is split
  const DType param_, grad_type_;
  const bool by_chance_;  // how a weight without a master is rounded
  const Noise noise_;
  const uint32_t first_;
  // Two or three streams AMD's cores follow better by themselves: SGD is 1.06 times as fast so, with momentum 1.05.
  const int64_t ahead_ = kToFirstCache && Rule::kMoments < 2 ? 0 : ahead_of(2 + Rule::kMoments);
  void* moment_[Rule::kMoments > 0 ? Rule::kMoments : 1];
  DType moment_type_[Rule::kMoments > 0 ? Rule::kMoments : 1];
};

// Where moments in bf16 are met often enough to be compiled for.
template <Types kTypes>
constexpr bool kNarrowed = kTypes == Types::kFp32 || kTypes == Types::kSplitFp16 || kTypes == Types::kSplitBf16;

// call(streams) with what is known of the span's types
template <class Rule, class Call>
auto with_streams(const Span& span, const Call& call) {
  const auto known = [&]<Types kTypes>() {
    if (all_moments(span, Rule::kMoments, DType::kFloat32)) return call(Streams<Rule, kTypes>(span));
    if constexpr (Rule::kMoments > 0 && kNarrowed<kTypes>) {
      constexpr DType kHalf = DType::kBFloat16;
      if (all_moments(span, Rule::kMoments, kHalf)) return call(Streams<Rule, kTypes, kHalf>(span));
    }
    return call(Streams<Rule, Types::kAny>(span));
  };
  switch (types_of(span)) {
    case Types::kFp32:
      return known.template operator()<Types::kFp32>();
    case Types::kFp16:
      return known.template operator()<Types::kFp16>();
    case Types::kBf16:
      return known.template operator()<Types::kBf16>();
    case Types::kSplitFp16:
      return known.template operator()<Types::kSplitFp16>();
    case Types::kSplitBf16:
      return known.template operator()<Types::kSplitBf16>();
    case Types::kAloneFp16:
      return known.template operator()<Types::kAloneFp16>();
    case Types::kAloneBf16:
      return known.template operator()<Types::kAloneBf16>();
    default:
      return known.template operator()<Types::kAny>();
  }
}

// call(moment[0], moment[1], ...), as many as the rule keeps
template <class Loaded, class Call>
DF_INLINE auto with_moments(Loaded& x, const Call& call) {
  return std::apply([&](auto&... moment) { return call(moment...); }, x.moment);
}

}  // namespace deepfast::cpu
