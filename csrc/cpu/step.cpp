// The step: unscale, clip, update, write the weight, reset the gradient, each value in registers once.
#include <array>
#include <cstring>
#include <tuple>

#include "../math/rules.h"
#include "blocks.h"
#include "kernels.h"
#include "reduce.h"

namespace deepfast::cpu {
namespace {

// Elements from which 16-bit weights are written past the caches: below, the next forward pass finds them there. A
// plain store would read the line first, and evict what the step still needs.
constexpr int64_t kStreamFrom = 4 << 20;

// The types of a span's weight and gradient, so far as they are known when a loop is compiled: both fp32; both the same
// 16-bit one, with a master; or any.
enum class Types { kFp32, kFp16, kBf16, kAny };

Types types_of(const Span& span) {
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
        half_(span.master ? static_cast<uint16_t*>(span.param) : nullptr),
        param_(span.param_dtype),
        grad_type_(span.grad_dtype) {
    for (int k = 0; k < Rule::kMoments; ++k) moment_[k] = span.moment[k];
  }

  template <class V>
  struct Loaded {
    V p, g;
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
    cpu::ask_ahead(weight_, weight_dtype(), i);
    if constexpr (kGrad) cpu::ask_ahead(grad_, grad_dtype(), i);
    for (int k = 0; k < Rule::kMoments; ++k) cpu::ask_ahead(moment_[k], DType::kFloat32, i);
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
  uint16_t* half_;  // then the parameter
  const DType param_, grad_type_;
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

// Elements [begin, end): a formula that knows nothing of loops, in a loop that knows nothing of formulas.
template <class Rule, class Streams>
void update(const Rule rule, const Streams s, float multiplier, int64_t begin, int64_t n, bool past) {
  constexpr bool kGrad = !Rule::kNeedsNorms;
  for_each(
      n, [&](int64_t k) { s.template ask_ahead<kGrad>(begin + k); },
      [&](int64_t k, auto v) {
        const int64_t i = begin + k;
        auto x = s.template load<kGrad>(i, v);
        x.p = with_moments(x, [&](auto&... moment) { return rule.update(x.p, x.g * multiplier, moment...); });
        if constexpr (kGrad) s.store_moments(x, i);  // else the first pass has
        s.store_weight(x.p, i, past);
      });
}

void reset(const Span& span, int64_t offset, int64_t n) {
  const int64_t size = size_of(span.grad_dtype);
  std::memset(static_cast<char*>(span.grad) + offset * size, 0, n * size);
}

// The gradient as the step takes it. The sign of a step that ascends is not the gradient's.
void write_unscaled(const Span& span, int64_t offset, int64_t n, float multiplier) {
  for_each(
      n, [](int64_t) {},
      [&](int64_t k, auto v) {
        const int64_t i = offset + k;
        store(load<decltype(v)>(span.grad, span.grad_dtype, i) * multiplier, span.grad, span.grad_dtype, i);
      });
}

struct Table {
  const Span* spans;
  int64_t count;
  const double* hyper;  // [groups, stride], a row being the gradient's sign and what the rule's prepare() takes
  int64_t stride;

  const double* row(int64_t s) const { return hyper + spans[s].group * stride; }

  // Whether span s takes what its predecessor was prepared with.
  bool same(int64_t s) const {
    if (s == 0 || spans[s].group != spans[s - 1].group) return false;
    return !spans[s].step || *spans[s].step == *spans[s - 1].step;
  }

  template <class Rule>
  Rule prepare(int64_t s, float ahead) const {
    const int64_t t = Rule::kCountsSteps ? static_cast<int64_t>(*spans[s].step + ahead) : 0;
    return Rule::prepare(row(s) + 1, t);
  }
};

template <class Rule>
void step_with(const Table& table, const StepRecord& record, const Norms* norms, Afterwards after) {
  const Span* spans = table.spans;
  const Blocks blocks(spans, table.count);
  if (record.skipped()) {
    if (after == Afterwards::kReset) {
      blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t) { reset(spans[s], offset, n); });
    }
    return;
  }
  std::vector<Rule> rules(table.count);
  for (int64_t s = 0; s < table.count; ++s) {
    if constexpr (Rule::kCountsSteps) *spans[s].step += 1.0f;
    rules[s] = table.same(s) ? rules[s - 1] : table.prepare<Rule>(s, 0.0f);
    if constexpr (Rule::kNeedsNorms) rules[s].adapt(norms[s]);
  }
  const bool past_caches = blocks.elements() >= kStreamFrom;
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t) {
    const Span& span = spans[s];
    const float multiplier = record.multiplier * static_cast<float>(*table.row(s));
    with_streams<Rule>(span, [&](const auto& streams) {
      update(rules[s], streams, multiplier, offset, n, past_caches && streams.aligned());
    });
    if (after == Afterwards::kReset) reset(span, offset, n);
    if (after == Afterwards::kWritten) write_unscaled(span, offset, n, record.multiplier);
  });
}

// The first pass of a rule that needs norms: moves the moments on, and measures.
template <class Rule, class Streams>
Norms measure(const Rule rule, const Streams s, float multiplier, int64_t begin, int64_t n) {
  alignas(64) float params[kLanes] = {}, directions[kLanes] = {};
  Pack largest_param = 0.0f, largest_direction = 0.0f;
  for_each(
      n, [&](int64_t k) { s.template ask_ahead<true>(begin + k); },
      [&](int64_t k, auto v) {
        auto x = s.template load<true>(begin + k, v);
        const auto r = with_moments(x, [&](auto&... moment) { return rule.direct(x.p, x.g * multiplier, moment...); });
        s.store_moments(x, begin + k);
        add_squares(x.p, k, params, largest_param);
        add_squares(r, k, directions, largest_direction);
      });
  const auto again = [&](int64_t k) { return s.template load<false>(begin + k, 0.0f); };
  return {
      total(params, largest_param, n, [&](int64_t k) { return again(k).p; }),
      total(directions, largest_direction, n,
            [&](int64_t k) {
              const auto x = again(k);
              return with_moments(x, [&](auto&... moment) { return rule.direction(x.p, moment...); });
            }),
  };
}

template <class Rule>
void norms_with(const Table& table, const StepRecord& record, Norms* out) {
  std::fill(out, out + table.count, Norms());
  if (record.skipped()) return;
  const Span* spans = table.spans;
  const Blocks blocks(spans, table.count);
  std::vector<Rule> rules(table.count);
  for (int64_t s = 0; s < table.count; ++s) rules[s] = table.same(s) ? rules[s - 1] : table.prepare<Rule>(s, 1.0f);
  std::vector<Norms> partial(blocks.size());
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t block) {
    const Span& span = spans[s];
    const float multiplier = record.multiplier * static_cast<float>(*table.row(s));
    partial[block] = with_streams<Rule>(
        span, [&](const auto& streams) { return measure(rules[s], streams, multiplier, offset, n); });
  });
  for (int64_t s = 0; s < table.count; ++s) {
    out[s] = fold<Norms>(partial.data() + blocks.first(s), blocks.first(s + 1) - blocks.first(s));
  }
}

struct Entry {
  decltype(&step_with<SGD<false>>) step;
  decltype(&norms_with<LAMB>) norms;  // null where the rule needs none
};

template <class Rule>
constexpr Entry entry() {
  Entry result = {&step_with<Rule>, {}};
  if constexpr (Rule::kNeedsNorms) result.norms = &norms_with<Rule>;
  return result;
}

#define DEEPFAST_ENTRY(name, Rule) entry<Rule>(),
constexpr Entry kEntries[] = {DEEPFAST_RULES(DEEPFAST_ENTRY)};
#undef DEEPFAST_ENTRY

}  // namespace

void norms(int rule, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
           const StepRecord& record, Norms* out) {
  kEntries[rule].norms({spans, count, hyper, hyper_stride}, record, out);
}

void step(int rule, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
          const StepRecord& record, const Norms* norms, Afterwards after) {
  kEntries[rule].step({spans, count, hyper, hyper_stride}, record, norms, after);
}

}  // namespace deepfast::cpu
