// Every rule's step (csrc/math/rules.h) and, where it needs norms, its first pass.
#include <stdexcept>

#include "norms.cuh"

namespace deepfast::cuda {
namespace {

struct Entry {
  decltype(&launch_step<SGD<false>>) step;
  decltype(&launch_norms<LAMB>) norms;  // null where the rule needs none
};

template <class Rule>
constexpr Entry entry() {
  Entry result = {&launch_step<Rule>, nullptr};
  if constexpr (Rule::kNeedsNorms) result.norms = &launch_norms<Rule>;
  return result;
}

#define DEEPFAST_ENTRY(name, Rule) entry<Rule>(),
constexpr Entry kEntries[] = {DEEPFAST_RULES(DEEPFAST_ENTRY)};
#undef DEEPFAST_ENTRY

}  // namespace

Needs norms_needs(const Job& job) {
  const int64_t blocks = blocks_of(job, kStepBlock), slots = fold_slot(blocks, job.count);
  return {static_cast<int64_t>((blocks + slots) * sizeof(Norms)), slots, table_bytes(job)};
}

Needs step_needs(const Job& job) { return {0, 1, table_bytes(job)}; }

void norms(int rule, const Job& job, const Workspace& workspace, const StepRecord* record, Norms* out, Stream stream) {
  Packed packed;
  pack(packed, job, kStepBlock, workspace, stream);
  kEntries[rule].norms(packed, workspace, record, out, stream);
}

void step(int rule, const Job& job, const Workspace& workspace, const StepRecord* record, const Norms* norms,
          Afterwards after, const Sinks& sinks, Stream stream) {
  if (sinks.count > kMaxSinks) throw std::runtime_error("deepfast: a step's weights go to at most 8 ranks");
  Others others = {};
  for (; others.count < sinks.count; ++others.count)
    others.displacement[others.count] = sinks.displacement[others.count];
  Packed packed;
  pack(packed, job, kStepBlock, workspace, stream);
  kEntries[rule].step(packed, workspace, record, norms, after, others, stream);
}

}  // namespace deepfast::cuda
