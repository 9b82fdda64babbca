// Every rule's step (csrc/math/rules.h) and, where it needs norms, its first pass.
#include <algorithm>
#include <stdexcept>

#include "norms.cuh"

namespace deepfast::cuda {
namespace {

struct Entry {
  decltype(&launch_step<SGD<false>, false>) step[2];
  decltype(&launch_norms<LAMB, false>) norms[2];  // null where the rule needs none
};

template <class Rule>
constexpr Entry entry() {
  Entry result = {{&launch_step<Rule, false>, &launch_step<Rule, true>}, {}};
  if constexpr (Rule::kNeedsNorms) {
    result.norms[false] = &launch_norms<Rule, false>;
    result.norms[true] = &launch_norms<Rule, true>;
  }
  return result;
}

#define DEEPFAST_ENTRY(name, Rule) entry<Rule>(),
constexpr Entry kEntries[] = {DEEPFAST_RULES(DEEPFAST_ENTRY)};
#undef DEEPFAST_ENTRY

// Whether some span's moments are not in fp32.
bool has_narrow_moments(int rule, const Job& job) {
  const int moments = kRules[rule].moments;
  return std::any_of(job.spans, job.spans + job.count, [&](const Span& span) {
    return std::any_of(span.moment_dtype, span.moment_dtype + moments, [](DType d) { return d != DType::kFloat32; });
  });
}

// Whether some span is rounded by chance, or has its steps counted where the rule does not.
bool has_chance(int rule, const Job& job) {
  return std::any_of(job.spans, job.spans + job.count, [&](const Span& span) {
    return span.rounding != Rounding::kNearest || (span.step && !kRules[rule].counts_steps);
  });
}

}  // namespace

Needs norms_needs(const Job& job) {
  const int64_t blocks = blocks_of(job, kStepBlock), slots = fold_slot(blocks, job.count);
  return {static_cast<int64_t>((blocks + slots) * sizeof(Norms)), slots, table_bytes(job)};
}

Needs step_needs(const Job& job) { return {0, 1, table_bytes(job)}; }

void norms(int rule, const Job& job, const Workspace& workspace, const StepRecord* record, Norms* out, Stream stream) {
  Packed packed;
  pack(packed, job, kStepBlock, workspace, stream);
  kEntries[rule].norms[has_narrow_moments(rule, job)](packed, workspace, record, out, stream);
}

void step(int rule, const Job& job, const Workspace& workspace, const StepRecord* record, const Norms* norms,
          Afterwards after, const Sinks& sinks, Stream stream) {
  if (sinks.count > kMaxSinks) throw std::runtime_error("deepfast: a step's weights go to at most 8 ranks");
  Others others = {};
  for (; others.count < sinks.count; ++others.count)
    others.displacement[others.count] = sinks.displacement[others.count];
  Packed packed;
  pack(packed, job, kStepBlock, workspace, stream);
  const bool narrow = has_narrow_moments(rule, job) || has_chance(rule, job);
  kEntries[rule].step[narrow](packed, workspace, record, norms, after, others, stream);
}

}  // namespace deepfast::cuda
