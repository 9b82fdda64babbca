// The CUDA backend's entry points: torch-free, so that they compile in seconds, and with g++ for tests without a GPU.
//
// Every function launches on `stream` of the current device and returns; nothing waits. All pointers are to device
// memory but for what is said to be on the host. Errors of the runtime are thrown as std::runtime_error.
#pragma once

#include <cstdint>

#include "../math/record.h"
#include "../math/rules.h"
#include "../math/scaler.h"
#include "../span.h"

namespace deepfast::cuda {

using Stream = void*;  // cudaStream_t

// A row of hyperparameters: the gradient's sign (-1 to maximize) and what the rule's prepare() takes, the learning rate
// first. Where `lr` is not null, it is read on the device and stands for values[1].
constexpr int kMaxHyper = 8;
static_assert([] {
  for (const RuleInfo& rule : kRules) {
    if (rule.hyper > kMaxHyper) return false;
  }
  return true;
}());
struct Hyper {
  double values[kMaxHyper];
  const void* lr;
  bool lr_is_fp64;
};

// A list of spans for one launch, on the host.
struct Job {
  const Span* spans;
  int64_t count;
  const Hyper* hyper;  // null where no step is made
  int64_t groups;
};

// Device memory that outlives a launch; whoever calls allocates it. `table` serves lists that do not fit a launch's
// parameters (null where they do); `sent` (host, as long) is what it holds, so that only what has changed is sent.
// `counters` are zero, and are left so.
struct Workspace {
  void* partial;
  uint32_t* counters;
  char* table;
  char* sent;  // null: nothing is known of the table, and nothing is remembered
};
constexpr uint64_t kUnknown = ~uint64_t{0};  // a word of `sent` that says nothing

// How much of it a function takes.
struct Needs {
  int64_t partial;   // bytes
  int64_t counters;  // how many
  int64_t table;     // bytes; 0: the launch's own parameters will do
};
Needs statistics_needs(const Job& job);
Needs norms_needs(const Job& job);
Needs step_needs(const Job& job);
Needs accumulate_needs(const Job& job);
Needs refresh_needs(const Job& job);

// What `decide` (csrc/math/record.h) is asked; pointers may be null.
struct Question {
  const float* grad_scale;
  const float* found_inf;
  float max_norm;
  bool check;
};

// Reads every gradient of the list once. Fills what is not null: the statistics, and the record that follows from them.
void statistics(const Job& job, const Workspace& workspace, Statistics* out, StepRecord* record,
                const Question& question, Stream stream);

// statistics may be null: zeros.
void decide(StepRecord* record, const Statistics* statistics, const Question& question, Stream stream);

// rule: a row of kRules (csrc/math/rules.h).
// The first pass of a rule that needs norms: moves the moments on; out[count]: the sums of squares of each span that is
// not empty. Those of a parameter that is cut over several ranks are to be added before `step`.
void norms(int rule, const Job& job, const Workspace& workspace, const StepRecord* record, Norms* out, Stream stream);

// One step over the whole list, one launch. norms: [count], for a rule that needs them. sinks: in peers' memory.
constexpr int kMaxSinks = 7;
void step(int rule, const Job& job, const Workspace& workspace, const StepRecord* record, const Norms* norms,
          Afterwards after, const Sinks& sinks, Stream stream);

// Where a master, rounded, is not its 16-bit weight, it becomes the weight.
void refresh(const Job& job, const Workspace& workspace, Stream stream);

// sums (span.param, fp32) = weight * grad, or += where `overwrite` is false.
void accumulate(const Job& job, const Workspace& workspace, float weight, bool overwrite, Stream stream);

// found_inf (host): [count] pointers. `table` as in Workspace, scaler_table_bytes(count) long.
int64_t scaler_table_bytes(int64_t count);
void scaler_update(ScalerState* state, const float* const* found_inf, int64_t count, char* table,
                   const ScalerOptions& options, Stream stream);

// Whether `stream` is being captured into a graph: then nothing may be taken from memory that can change later.
bool is_capturing(Stream stream);

}  // namespace deepfast::cuda
