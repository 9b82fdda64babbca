// The step: unscale, clip, update, write the weight, reset the gradient, each value in registers once.
#include <cstring>
#include <utility>

#include "../math/adam.h"
#include "blocks.h"
#include "convert.h"
#include "kernels.h"

namespace deepfast::cpu {
namespace {

// Elements from which 16-bit weights are written past the caches: below, the next forward pass finds them there.
constexpr int64_t kStreamFrom = 4 << 20;

// p[n], g[n], each moment[n]: a formula that knows nothing of loops, in a loop that knows nothing of formulas.
template <class Rule, class... Moment>
void update(const Rule rule, float multiplier, int64_t n, float* __restrict p, const float* __restrict g,
            Moment* __restrict... moment) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    p[i] = rule.update(p[i], g[i] * multiplier, moment[i]...);
  }
}

void reset(const Span& span, int64_t offset, int64_t n) {
  const int64_t width = span.grad_dtype == DType::kFloat32 ? 4 : 2;
  std::memset(static_cast<char*>(span.grad) + offset * width, 0, n * width);
}

template <class Rule>
void step_with(const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride, const StepRecord& record,
               bool reset_grad) {
  const Blocks blocks(spans, count);
  if (record.skipped()) {
    if (reset_grad) {
      blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t) { reset(spans[s], offset, n); });
    }
    return;
  }
  std::vector<Rule> rules(count);
  for (int64_t s = 0; s < count; ++s) {
    *spans[s].step += 1.0f;
    rules[s] = Rule::prepare(hyper + spans[s].group * hyper_stride + 1, static_cast<int64_t>(*spans[s].step));
  }
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t) {
    const Span& span = spans[s];
    const bool wide = span.param_dtype == DType::kFloat32;
    alignas(64) float staged_param[kBlock], staged_grad[kBlock];
    const float* g = decode(span.grad, span.grad_dtype, offset, n, staged_grad);
    float* p = span.master ? span.master + offset
                           : const_cast<float*>(decode(span.param, span.param_dtype, offset, n, staged_param));
    const float sign = static_cast<float>(hyper[span.group * hyper_stride]);
    [&]<size_t... K>(std::index_sequence<K...>) {
      update(rules[s], record.multiplier * sign, n, p, g, (span.moment[K] + offset)...);
    }(std::make_index_sequence<Rule::kMoments>());
    if (!wide && blocks.elements() >= kStreamFrom) {
      alignas(64) uint16_t weights[kBlock];
      encode(p, weights, span.param_dtype, 0, n, span.master != nullptr);
      stream(weights, static_cast<uint16_t*>(span.param) + offset, n);
    } else if (!wide) {
      encode(p, span.param, span.param_dtype, offset, n, span.master != nullptr);
    }
    if (reset_grad) reset(span, offset, n);
  });
}

struct Entry {
  const char* name;
  RuleSize size;
  decltype(&step_with<AdamW<false>>) run;
};

template <class Rule>
constexpr Entry entry(const char* name) {
  return {name, {Rule::kMoments, 1 + Rule::kHyper}, &step_with<Rule>};
}

// One line a rule.
constexpr Entry kRules[] = {
    entry<AdamW<false>>("adamw"),
    entry<AdamW<true>>("adamw_amsgrad"),
};

const Entry* find(const char* name) {
  for (const Entry& rule : kRules) {
    if (std::strcmp(rule.name, name) == 0) return &rule;
  }
  return nullptr;
}

}  // namespace

RuleSize size_of(const char* name) {
  const Entry* rule = find(name);
  return rule ? rule->size : RuleSize{-1, 0};
}

void step(const char* name, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
          const StepRecord& record, bool reset_grad) {
  find(name)->run(spans, count, hyper, hyper_stride, record, reset_grad);
}

}  // namespace deepfast::cpu
