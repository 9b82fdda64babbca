// The CPU backend's entry points: torch-free, so that they compile in seconds and can be tested alone.
#pragma once

#include <cstdint>

#include "../math/record.h"
#include "../math/scaler.h"
#include "../span.h"

namespace deepfast::cpu {

// Reads every gradient of the table once. The same bits from run to run and for any number of threads.
Statistics statistics(const Span* spans, int64_t count);

// rule: a row of kRules (csrc/math/rules.h).

// The first pass of a rule that needs norms: moves the moments on; out[count]: the sums of squares of each span. Those
// of a parameter that is cut into several spans, or over several ranks, are to be added before `step`.
void norms(int rule, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
           const StepRecord& record, Norms* out);

// The same before they are added up: one for each block of kStepBlock elements of each span.
void norms_of_blocks(int rule, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
                     const StepRecord& record, Norms* out);

// One step over the whole table, in one parallel region.
// hyper: [groups, hyper_stride] fp64, a row being the gradient's sign (-1 to maximize) and what the rule's prepare()
// takes. norms: [count], for a rule that needs them.
void step(int rule, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
          const StepRecord& record, const Norms* norms, Afterwards after, const Sinks& sinks = {});

// Where a master, rounded, is not its 16-bit weight, it becomes the weight: somebody else has written to that. What a
// master knows beyond 16 bits stays elsewhere.
void refresh(const Span* spans, int64_t count);

// sums (span.param, fp32) = weight * grad, or += where `overwrite` is false.
void accumulate(const Span* spans, int64_t count, float weight, bool overwrite);

}  // namespace deepfast::cpu
