// What a step reads and writes of a span, register by register, with as much of its types as is known when the loop is
// compiled.
#pragma once

#include <array>
#include <tuple>

#include "strips.h"

namespace deepfast::cpu {

// The types of a span's streams, so far as they are known when a loop is compiled: all fp32; weight and gradient the same
// 16-bit type, with an fp32 or a split master and fp32 moments; or any.
enum class Types { kFp32, kFp16, kBf16, kSplitFp16, kSplitBf16, kAny };

inline Types types_of(const Span& span, int moments) {
  if (span.param_dtype != span.grad_dtype || !span.master != (span.param_dtype == DType::kFloat32)) return Types::kAny;
  for (int k = 0; k < moments; ++k) {
    if (span.moment_dtype[k] != DType::kFloat32) return Types::kAny;
  }
  switch (span.param_dtype) {
    case DType::kFloat32:
      return Types::kFp32;
    case DType::kFloat16:
      return span.has_split() ? Types::kSplitFp16 : Types::kFp16;
    default:
      return span.has_split() ? Types::kSplitBf16 : Types::kBf16;
  }
}

// What a rule reads and writes of a span.
template <class Rule, Types kTypes>
class Streams {
  static constexpr bool kAny = kTypes == Types::kAny, kFp32 = kTypes == Types::kFp32;
  static constexpr bool kSplit = kTypes == Types::kSplitFp16 || kTypes == Types::kSplitBf16;
  static constexpr DType kKnown = kFp32 ? DType::kFloat32
                                  : kTypes == Types::kFp16 || kTypes == Types::kSplitFp16 ? DType::kFloat16
                                                                                          : DType::kBFloat16;

 public:
  explicit Streams(const Span& span)
      : grad_(span.grad),
        weight_(span.master && !span.has_split() ? span.master : span.param),
        half_(span.master && span.param_dtype != DType::kFloat32 ? static_cast<uint16_t*>(span.param) : nullptr),
        remainder_(span.has_split() ? static_cast<uint16_t*>(span.master) : nullptr),
        param_(span.param_dtype),
        grad_type_(span.grad_dtype),
        by_chance_(span.rounding == Rounding::kStochastic && !span.master),
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
    x.p = has_split()
              ? decode_split(cpu::load(half_ + i, v), cpu::load(remainder_ + i, v), param_dtype())
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
    if (kAny && by_chance_ && param_dtype() != DType::kFloat32) {
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
  DF_INLINE bool has_master() const { return kAny ? half_ != nullptr : !kFp32; }
  DF_INLINE bool has_split() const { return kAny ? remainder_ != nullptr : kSplit; }
  DF_INLINE DType param_dtype() const { return kAny ? param_ : kKnown; }
  DF_INLINE DType grad_dtype() const { return kAny ? grad_type_ : kKnown; }
  DF_INLINE DType weight_dtype() const { return has_master() && !has_split() ? DType::kFloat32 : param_dtype(); }
  DF_INLINE DType moment_dtype(int k) const { return kAny ? moment_type_[k] : DType::kFloat32; }

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

// call(streams) with what is known of the span's types
template <class Rule, class Call>
auto with_streams(const Span& span, const Call& call) {
  switch (types_of(span, Rule::kMoments)) {
    case Types::kFp32:
      return call(Streams<Rule, Types::kFp32>(span));
    case Types::kFp16:
      return call(Streams<Rule, Types::kFp16>(span));
    case Types::kBf16:
      return call(Streams<Rule, Types::kBf16>(span));
    case Types::kSplitFp16:
      return call(Streams<Rule, Types::kSplitFp16>(span));
    case Types::kSplitBf16:
      return call(Streams<Rule, Types::kSplitBf16>(span));
    default:
      return call(Streams<Rule, Types::kAny>(span));
  }
}

// call(moment[0], moment[1], ...), as many as the rule keeps
template <class Loaded, class Call>
DF_INLINE auto with_moments(Loaded& x, const Call& call) {
  return std::apply([&](auto&... moment) { return call(moment...); }, x.moment);
}

}  // namespace deepfast::cpu
