// The step: unscale, clip, update, write the weight, reset the gradient, each value in registers once.
#include <cstring>
#include <utility>

#include "../math/rules.h"
#include "blocks.h"
#include "convert.h"
#include "kernels.h"
#include "reduce.h"

namespace deepfast::cpu {
namespace {

// Elements from which 16-bit weights are written past the caches: below, the next forward pass finds them there.
constexpr int64_t kStreamFrom = 4 << 20;

// p[n], g[n], each moment[n]: a formula that knows nothing of loops, in a loop that knows nothing of formulas.
template <class Rule, class... Moment>
void update(const Rule rule, float multiplier, int64_t n, float* p, const float* g, Moment*... moment) {
  const auto element = [=](int64_t i) { p[i] = rule.update(p[i], g[i] * multiplier, moment[i]...); };
  if constexpr (Rule::kNeedsNorms) {
    for_each(n, element, p, moment...);
  } else {
    for_each(n, element, p, g, moment...);
  }
}

template <class Rule, class... Moment>
void direct(const Rule rule, float multiplier, int64_t n, const float* p, const float* g, float* direction,
            Moment*... moment) {
  for_each(n, [=](int64_t i) { direction[i] = rule.direct(p[i], g[i] * multiplier, moment[i]...); }, p, g, moment...);
}

// call(span.moment[0] + offset, span.moment[1] + offset, ...), as many as the rule keeps
template <class Rule, class Call>
void with_moments(const Span& span, int64_t offset, const Call& call) {
  [&]<size_t... K>(std::index_sequence<K...>) {
    call((span.moment[K] + offset)...);
  }(std::make_index_sequence<Rule::kMoments>());
}

// The block's weights in fp32: the master's where there is one, else decoded into `staging` (or in place).
float* weights(const Span& span, int64_t offset, int64_t n, float* staging) {
  if (span.master) return span.master + offset;
  return const_cast<float*>(decode(span.param, span.param_dtype, offset, n, staging));
}

void reset(const Span& span, int64_t offset, int64_t n) {
  const int64_t width = span.grad_dtype == DType::kFloat32 ? 4 : 2;
  std::memset(static_cast<char*>(span.grad) + offset * width, 0, n * width);
}

// The gradient as the step takes it. The sign of a step that ascends is not the gradient's.
void write_unscaled(const Span& span, int64_t offset, int64_t n, float multiplier) {
  alignas(64) float staged[kBlock];
  const float* g = decode(span.grad, span.grad_dtype, offset, n, staged);
  const bool wide = span.grad_dtype == DType::kFloat32;
  float* out = wide ? static_cast<float*>(span.grad) + offset : staged;
  for (int64_t i = 0; i < n; ++i) out[i] = g[i] * multiplier;
  if (!wide) encode(staged, span.grad, span.grad_dtype, offset, n, false);
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
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t) {
    const Span& span = spans[s];
    alignas(64) float staged_param[kBlock], staged_grad[kBlock];
    const float* g = Rule::kNeedsNorms ? staged_grad : decode(span.grad, span.grad_dtype, offset, n, staged_grad);
    float* p = weights(span, offset, n, staged_param);
    const float multiplier = record.multiplier * static_cast<float>(*table.row(s));
    with_moments<Rule>(span, offset, [&](auto*... moment) { update(rules[s], multiplier, n, p, g, moment...); });
    const bool wide = span.param_dtype == DType::kFloat32;
    if (!wide && blocks.elements() >= kStreamFrom) {
      alignas(64) uint16_t encoded[kBlock];
      encode(p, encoded, span.param_dtype, 0, n, span.master != nullptr);
      stream(encoded, static_cast<uint16_t*>(span.param) + offset, n);
    } else if (!wide) {
      encode(p, span.param, span.param_dtype, offset, n, span.master != nullptr);
    }
    if (after == Afterwards::kReset) reset(span, offset, n);
    if (after == Afterwards::kWritten) write_unscaled(span, offset, n, record.multiplier);
  });
}

// The first pass of a rule that needs norms: moves the moments on, and measures.
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
    alignas(64) float staged_param[kBlock], staged_grad[kBlock], direction[kBlock];
    const float* g = decode(span.grad, span.grad_dtype, offset, n, staged_grad);
    const float* p = weights(span, offset, n, staged_param);
    const float multiplier = record.multiplier * static_cast<float>(*table.row(s));
    with_moments<Rule>(span, offset,
                       [&](auto*... moment) { direct(rules[s], multiplier, n, p, g, direction, moment...); });
    partial[block] = {sum_of_squares(p, DType::kFloat32, 0, n), sum_of_squares(direction, DType::kFloat32, 0, n)};
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
