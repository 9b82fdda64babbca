// The CPU backend's entry points: torch-free, so that they compile in seconds and can be tested alone.
#pragma once

#include <cstdint>
#include <optional>

#include "../math/lamb.h"
#include "../math/record.h"
#include "../math/scaler.h"
#include "../span.h"

namespace deepfast::cpu {

// Reads every gradient of the table once. The same bits from run to run and for any number of threads.
Statistics statistics(const Span* spans, int64_t count);

// What the rule called `name` keeps and takes; nothing if there is no such rule.
struct RuleInfo {
  int moments;
  int hyper;  // values in a row of the hyperparameter table, the gradient's sign included
  bool counts_steps;
  bool needs_norms;
};
std::optional<RuleInfo> info(const char* name);

// The first pass of a rule that needs norms: moves the moments on; out[count]: the sums of squares of each span. Those
// of a parameter that is cut into several spans, or over several ranks, are to be added before `step`.
void norms(const char* name, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
           const StepRecord& record, Norms* out);

// One step of the rule called `name` over the whole table, in one parallel region.
// hyper: [groups, hyper_stride] fp64, a row being the gradient's sign (-1 to maximize) and what the rule's prepare()
// takes. norms: [count], for a rule that needs them. reset_grad: zero the gradients in the same pass, skipped steps
// included.
void step(const char* name, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
          const StepRecord& record, const Norms* norms, bool reset_grad);

// sums (span.param, fp32) = weight * grad, or += where `overwrite` is false.
void accumulate(const Span* spans, int64_t count, float weight, bool overwrite);

}  // namespace deepfast::cpu
