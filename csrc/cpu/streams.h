// What a step reads and writes of a span, register by register, with as much of its types as is known when the loop is
// compiled.
#pragma once

#include <array>
#include <tuple>

#include "strips.h"

namespace deepfast::cpu {

// The types of a span's weight and gradient, so far as they are known when a loop is compiled: both fp32; both the same
// 16-bit one, with a master; or any.
enum class Types { kFp32, kFp16, kBf16, kAny };
static_assert(static_cast<DType>(Types::kFp32) == DType::kFloat32);
static_assert(static_cast<DType>(Types::kFp16) == DType::kFloat16);
static_assert(static_cast<DType>(Types::kBf16) == DType::kBFloat16);

inline Types types_of(const Span& span) {
  if (span.param_dtype != span.grad_dtype || !span.master != (span.param_dtype == DType::kFloat32)) return Types::kAny;
  return static_cast<Types>(span.param_dtype);
}

// What a rule reads and writes of a span.
template <class Rule, Types kTypes>
class Streams {
  static constexpr DType kKnown = static_cast<DType>(kTypes);
  static constexpr bool kAny = kTypes == Types::kAny, kFp32 = kTypes == Types::kFp32;

 public:
  explicit Streams(const Span& span)
      : grad_(span.grad),
        weight_(span.master ? span.master : span.param),
        half_(span.master && span.param_dtype != DType::kFloat32 ? static_cast<uint16_t*>(span.param) : nullptr),
        param_(span.param_dtype),
        grad_type_(span.grad_dtype) {
    for (int k = 0; k < Rule::kMoments; ++k) moment_[k] = span.moment[k];
  }

  template <class V>
  struct Loaded {
    V p, g = 0.0f;
    std::array<V, Rule::kMoments> moment;
  };

  template <bool kGrad, class V>
  DF_INLINE Loaded<V> load(int64_t i, V) const {
    Loaded<V> x;
    x.p = cpu::load<V>(weight_, weight_dtype(), i);
    if constexpr (kGrad) x.g = cpu::load<V>(grad_, grad_dtype(), i);
    for (int k = 0; k < Rule::kMoments; ++k) x.moment[k] = cpu::load(moment_[k] + i, V());
    return x;
  }

  template <class V>
  DF_INLINE void store_moments(const Loaded<V>& x, int64_t i) const {
    for (int k = 0; k < Rule::kMoments; ++k) store(x.moment[k], moment_[k] + i);
  }

  template <class V>
  DF_INLINE void store_weight(V p, int64_t i, bool past_caches) const {
    store(p, weight_, weight_dtype(), i);
    if (!has_master()) return;
    const auto rounded = from_master(p, param_dtype());
    past_caches ? store_past_caches(rounded, half_ + i) : store(rounded, half_ + i);
  }

  template <bool kGrad>
  DF_INLINE void ask_ahead(int64_t i) const {
    cpu::ask_ahead(weight_, weight_dtype(), i, ahead_);
    if constexpr (kGrad) cpu::ask_ahead(grad_, grad_dtype(), i, ahead_);
    for (int k = 0; k < Rule::kMoments; ++k) cpu::ask_ahead(moment_[k], DType::kFloat32, i, ahead_);
  }

  // Whether the halves lie as a store past the caches needs it.
  bool aligned() const { return reinterpret_cast<uintptr_t>(half_) % (2 * kWidth<Pack>) == 0; }

 private:
  DF_INLINE bool has_master() const { return kAny ? half_ != nullptr : !kFp32; }
  DF_INLINE DType param_dtype() const { return kAny ? param_ : kKnown; }
  DF_INLINE DType grad_dtype() const { return kAny ? grad_type_ : kKnown; }
  DF_INLINE DType weight_dtype() const { return has_master() ? DType::kFloat32 : param_dtype(); }

  const void* grad_;
  void* weight_;    // the master where there is one
  uint16_t* half_;  // then the parameter, where that is 16 bits wide
  const DType param_, grad_type_;
  // Two or three streams AMD's cores follow better by themselves: SGD is 1.06 times as fast so, with momentum 1.05.
  const int64_t ahead_ = kToFirstCache && Rule::kMoments < 2 ? 0 : ahead_of(2 + Rule::kMoments);
  float* moment_[Rule::kMoments > 0 ? Rule::kMoments : 1];
};

// call(streams) with what is known of the span's types
template <class Rule, class Call>
auto with_streams(const Span& span, const Call& call) {
  switch (types_of(span)) {
    case Types::kFp32:
      return call(Streams<Rule, Types::kFp32>(span));
    case Types::kFp16:
      return call(Streams<Rule, Types::kFp16>(span));
    case Types::kBf16:
      return call(Streams<Rule, Types::kBf16>(span));
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
