// Every rule's step (csrc/math/rules.h) and, where it needs norms, its first pass.
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

int64_t norms_partials(const Job& job) {
  int64_t blocks = 0;
  for (int64_t s = 0; s < job.count; ++s) blocks += blocks_of(job.spans[s], kStepBlock);
  return blocks;
}

void norms(int rule, const Job& job, const Workspace& workspace, const StepRecord* record, Norms* out, Stream stream) {
  Packed packed;
  pack(packed, job, kStepBlock, workspace, stream);
  kEntries[rule].norms(packed, workspace, record, out, stream);
}

void step(int rule, const Job& job, const Workspace& workspace, const StepRecord* record, const Norms* norms,
          bool reset_grad, Stream stream) {
  Packed packed;
  pack(packed, job, kStepBlock, workspace, stream);
  kEntries[rule].step(packed, workspace, record, norms, reset_grad, stream);
}

}  // namespace deepfast::cuda
