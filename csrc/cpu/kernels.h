// The CPU backend's entry points: torch-free, so that they compile in seconds and can be tested alone.
#pragma once

#include <cstdint>

#include "../math/record.h"
#include "../math/scaler.h"
#include "../span.h"

namespace deepfast::cpu {

// Reads every gradient of the table once. The same bits from run to run and for any number of threads.
Statistics statistics(const Span* spans, int64_t count);

// One step of the rule called `name` over the whole table, in one parallel region.
// hyper: [groups, hyper_stride] fp64, a row being the gradient's sign (-1 to maximize) and what the rule's prepare()
// takes. reset_grad: zero the gradients in the same pass, skipped steps included.
void step(const char* name, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
          const StepRecord& record, bool reset_grad);

// What the rule called `name` keeps and takes; moments is -1 if there is no such rule.
struct RuleSize {
  int moments;
  int hyper;  // values in a row of the hyperparameter table, the sign included
};
RuleSize size_of(const char* name);

// sums (span.param, fp32) = weight * grad, or += where `overwrite` is false.
void accumulate(const Span* spans, int64_t count, float weight, bool overwrite);

}  // namespace deepfast::cpu
