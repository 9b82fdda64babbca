// The CUDA kernels against the CPU kernels: equal to the last bit, over random lists of spans. For a GPU, and with
// tests/cuda_on_host for the host, where sanitizers watch.
//
//     harness SCENARIO CASES SEED
//
// Exit code 1: something differs; 3: the device reports an error; 2: this is no such scenario.
//
// Every buffer is allocated by itself and just as long as it has to be, so that an access beside it is seen, by the
// address sanitizer on the host and by compute-sanitizer on a GPU.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "../csrc/cpu/kernels.h"
#include "harness.h"
#include "harness_fold.h"
#include "harness_spans.h"

using namespace deepfast;

namespace {

#if defined(CUDA_ON_HOST)
int64_t launches() { return cuda_on_host::launches; }
void play(int processors) { cuda_on_host::processors = processors; }
constexpr bool kPlayed = true;
#else  // a GPU is what it is, and nobody counts its launches
int64_t launches() { return 0; }
void play(int) {}
constexpr bool kPlayed = false;
#endif

// Each of a rule's passes has two kernels, and they are two: which one is launched follows from the spans.
void require_kernel(int rule, const char* pass, bool asks) {
#if defined(CUDA_ON_HOST)
  static std::map<std::tuple<int, std::string, bool>, const void*> known;
  const void* kernel = known.try_emplace({rule, pass, asks}, cuda_on_host::kernel).first->second;
  require(kernel == cuda_on_host::kernel, "not the kernel of other spans that are kept like these");
  const auto other = known.find({rule, pass, !asks});
  require(other == known.end() || other->second != kernel, "the kernel of spans that are kept otherwise");
#endif
}

void require_one_launch(int64_t before, const char* otherwise) {
  require(!kPlayed || launches() - before == 1, otherwise);
}

// Hyperparameters for both sides; on the device, some learning rates are read from memory.
struct Hypers {
  std::vector<double> table;
  std::vector<cuda::Hyper> rows;
  Array<double> wide;
  Array<float> narrow;
  int64_t stride;

  Hypers(int rule, int64_t groups) : wide(groups), narrow(groups), stride(kRules[rule].hyper) {
    const std::string name = kRules[rule].name;
    for (int64_t g = 0; g < groups; ++g) {
      const auto below_one = [] { return chance(10) ? 0.0 : 1.0 - std::pow(10.0, -4.0 * std::fabs(uniform())); };
      const double lr = chance(10) ? 0.0 : std::fabs(uniform()) * 0.1, decay = chance(40) ? 0.0 : std::fabs(uniform());
      const double sign = chance(30) ? -1.0 : 1.0, eps = std::pow(10.0, -2 - 10.0 * std::fabs(uniform()));
      const double penalty = chance(30) ? 0.1 : 0.0, corrects = chance(70) ? 1.0 : 0.0;
      std::vector<double> row;
      if (name.starts_with("adam")) row = {lr, below_one(), below_one(), eps, decay, penalty, corrects};
      if (name.starts_with("sgd")) row = {lr, below_one(), chance(50) ? 0.0 : 0.5, decay, chance(50) ? 1.0 : 0.0};
      if (name == "lion") row = {lr, below_one(), below_one(), decay};
      if (name == "lamb") row = {lr, below_one(), below_one(), eps, decay, 0.0, chance(50) ? 10.0 : INFINITY};
      if (name == "adagrad") row = {lr, chance(50) ? 0.0 : 0.5, decay, eps};
      require(static_cast<int64_t>(row.size()) + 1 == stride, "no row of hyperparameters for " + name);
      cuda::Hyper on_device = {};
      if (chance(30)) {
        on_device.lr_is_fp64 = chance(50);
        wide[g] = lr;
        narrow[g] = static_cast<float>(lr);
        on_device.lr = on_device.lr_is_fp64 ? static_cast<const void*>(&wide[g]) : &narrow[g];
        if (!on_device.lr_is_fp64) row[0] = narrow[g];
      }
      row.insert(row.begin(), sign);
      table.insert(table.end(), row.begin(), row.end());
      std::copy(row.begin(), row.end(), on_device.values);
      if (on_device.lr) on_device.values[1] = 1e30;
      rows.push_back(on_device);
    }
  }
};

// A plan's device memory, each piece just as long as it has to be.
struct Memory {
  Array<char> partial, table, sent;
  Array<uint32_t> counters;
  const bool known = chance(70);  // what the table holds is remembered
  cuda::Workspace workspace;

  explicit Memory(const cuda::Needs& needs)
      : partial(needs.partial),
        table(needs.table),
        sent(needs.table, static_cast<char>(cuda::kUnknown)),
        counters(needs.counters),
        workspace{partial.data(), counters.data(), needs.table ? table.data() : nullptr,
                  needs.table && known ? sent.data() : nullptr} {}
  void check() const {
    for (uint32_t counter : counters) require(counter == 0, "a counter is not left at zero");
  }
};

StepRecord any_record() { return {chance(30) ? 1.0f : std::fabs(uniform()) * 2, chance(15) ? 2.0f : 0.0f, 0.0f}; }

// Some weights are written to by others, and their masters follow.
void refresh_case(Twins& twins, const Taste& taste) {
  std::vector<Span> on_cpu, on_cuda;
  for (size_t s = 0; s < twins.on_cpu.size(); ++s) {
    Span &a = twins.on_cpu[s], &b = twins.on_cuda[s];
    if (!a.master) continue;
    if (chance(50)) {
      Buffer written(a.numel, a.param_dtype, below(4));
      fill(written, a.param_dtype, taste);
      twins.add(std::move(written), &Span::param, a, b, "a written weight");
    }
    on_cpu.push_back(a);
    on_cuda.push_back(b);
  }
  cpu::refresh(on_cpu.data(), on_cpu.size());
  const cuda::Job job = {on_cuda.data(), static_cast<int64_t>(on_cuda.size()), nullptr, 0};
  const Memory memory(cuda::refresh_needs(job));
  cuda::refresh(job, memory.workspace, nullptr);
  finish("a refresh");
  twins.compare("after a refresh");
}

// Steps in a row over one list of spans; from step to step the gradients move, as they do in life.
void step_case(int rule, const std::vector<int64_t>& numels, int64_t groups) {
  doing = std::string(kRules[rule].name) + ", " + std::to_string(numels.size()) + " spans";
  Twins twins;
  const Taste taste = any_taste();
  const Forms forms = chance(25) ? Forms{false, false, false, false, false} : Forms();
  for (int64_t numel : numels) add_span(twins, rule, numel, taste, forms, groups);
  const int64_t count = numels.size();
  const Hypers hypers(rule, groups);
  const Afterwards after = static_cast<Afterwards>(below(3));
  cuda::Job job = {twins.on_cuda.data(), count, hypers.rows.data(), groups};
  const Memory steps(cuda::step_needs(job)), measures(cuda::norms_needs(job));
  for (int nth = 0; nth < 2; ++nth) {
    if (nth > 0) {
      for (int64_t s = 0; s < count; ++s) {
        if (chance(50)) continue;
        Buffer moved(twins.on_cpu[s].numel, twins.on_cpu[s].grad_dtype, below(4));
        fill(moved, twins.on_cpu[s].grad_dtype, taste);
        twins.add(std::move(moved), &Span::grad, twins.on_cpu[s], twins.on_cuda[s], "a moved grad");
      }
    }
    if (nth > 0) refresh_case(twins, taste);
    const Array<StepRecord> record(1, any_record());
    std::vector<Norms> expected(count);
    Array<Norms> got(count);
    if (kRules[rule].needs_norms) {
      cpu::norms(rule, twins.on_cpu.data(), count, hypers.table.data(), hypers.stride, record[0], expected.data());
      cuda::norms(rule, job, measures.workspace, record.data(), got.data(), nullptr);
      require_kernel(rule, "norms", narrow_moments(rule, twins.on_cuda));
      finish("norms");
      measures.check();
      for (int64_t s = 0; s < count; ++s) {
        const auto same = [](double a, double b) { return a == b || (a != a && b != b); };
        require(same(expected[s].param, got[s].param) && same(expected[s].direction, got[s].direction),
                "other norms for span " + std::to_string(s));
      }
      twins.compare("after the first pass");
    }
    // Another rank's weight has its place relative to this one's: the same for all spans, so there is one.
    int64_t further[2] = {};
    const bool sends = count == 1 && nth == 0 && chance(50);
    if (sends) further_on(twins, further);
    cpu::step(rule, twins.on_cpu.data(), count, hypers.table.data(), hypers.stride, record[0], expected.data(), after,
              {&further[0], sends});
    const int64_t before = launches();
    cuda::step(rule, job, steps.workspace, record.data(), got.data(), after, {&further[1], sends}, nullptr);
    require_kernel(rule, "step", needs_asking(rule, twins.on_cuda));
    finish("a step");
    if (cuda::step_needs(job).table == 0) require_one_launch(before, "more than one launch");
    steps.check();
    twins.compare("after a step");
  }
  if (cuda::step_needs(job).table > 0 && steps.known) {  // nothing has changed: nothing is to be sent
    const Array<StepRecord> skip(1, StepRecord{1.0f, 1.0f, 0.0f});
    const int64_t before = launches();
    cuda::step(rule, job, steps.workspace, skip.data(), nullptr, Afterwards::kKept, {}, nullptr);
    finish("a step that is skipped");
    require_one_launch(before, "an unchanged table was sent again");
  }
}

void statistics_case(int64_t count, int64_t most) {
  doing = "statistics of " + std::to_string(count) + " spans";
  std::vector<Buffer> buffers;
  std::vector<Span> spans(count);
  const Taste taste = any_taste();
  for (Span& span : spans) {
    span = {};
    span.numel = any_numel(most);
    span.grad_dtype = any_dtype();
    buffers.emplace_back(span.numel, span.grad_dtype, Offsets()());
    fill(buffers.back(), span.grad_dtype, taste);
    span.grad = buffers.back().data();
  }
  const cuda::Job job = {spans.data(), count, nullptr, 0};
  const Memory memory(cuda::statistics_needs(job));
  const Array<float> scale(1, chance(50) ? 1.0f : 65536.0f), found(1, chance(20) ? 2.0f : 0.0f);
  const float max_norm = chance(50) ? 0.0f : std::fabs(uniform());
  const bool check = chance(50);
  const cuda::Question question = {scale[0] == 1.0f ? nullptr : scale.data(), found[0] == 0.0f ? nullptr : found.data(),
                                   max_norm, check};
  Array<Statistics> got(1);
  Array<StepRecord> record(1), again(1);
  const int64_t before = launches();
  cuda::statistics(job, memory.workspace, got.data(), record.data(), question, nullptr);
  finish("statistics");
  if (cuda::step_needs(job).table == 0) require_one_launch(before, "more than one launch");
  memory.check();
  const Statistics expected = cpu::statistics(spans.data(), count);
  const auto same = [](double a, double b) { return a == b || (a != a && b != b); };
  require(same(expected.sum_of_squares, got[0].sum_of_squares), "another sum of squares");
  require(expected.non_finite == got[0].non_finite, "another number of blocks that are not finite");
  const StepRecord decided = decide(expected, scale[0], found[0], max_norm, check);
  cuda::decide(again.data(), got.data(), question, nullptr);
  finish("a decision");
  for (const StepRecord& r : {record[0], again[0]}) {
    require(same(decided.multiplier, r.multiplier) && decided.found_inf == r.found_inf &&
                same(decided.grad_norm, r.grad_norm),
            "another decision");
  }
}

void accumulate_case(int64_t count, int64_t most) {
  doing = "accumulation over " + std::to_string(count) + " spans";
  Twins twins;
  const Taste taste = any_taste();
  for (int64_t s = 0; s < count; ++s) {
    Span a = {}, b = {};
    const Offsets offset;
    a.numel = any_numel(most);
    a.grad_dtype = any_dtype();
    b = a;
    Buffer sum(a.numel, DType::kFloat32, offset()), grad(a.numel, a.grad_dtype, offset());
    fill(sum, DType::kFloat32, taste);
    fill(grad, a.grad_dtype, taste);
    twins.add(std::move(sum), &Span::param, a, b, "the sum");
    twins.add(std::move(grad), &Span::grad, a, b, "grad");
    twins.on_cpu.push_back(a);
    twins.on_cuda.push_back(b);
  }
  const cuda::Job job = {twins.on_cuda.data(), count, nullptr, 0};
  const Memory memory(cuda::accumulate_needs(job));
  for (const bool overwrite : {true, false}) {
    const float weight = uniform();
    cpu::accumulate(twins.on_cpu.data(), count, weight, overwrite);
    cuda::accumulate(job, memory.workspace, weight, overwrite, nullptr);
    finish("an accumulation");
    twins.compare(overwrite ? "after the first" : "after the second");
  }
}

void scaler_case(int64_t count) {
  doing = "the scaler, " + std::to_string(count) + " flags";
  Array<ScalerState> state(1, {std::ldexp(1.0f, static_cast<int>(below(30)) - 3), static_cast<float>(below(5)),
                               static_cast<float>(below(3)), static_cast<float>(below(3))});
  const ScalerOptions options = {2.0, 0.5, 1 + below(5), 1 + below(3), chance(50), chance(90), 1.0, 16777216.0};
  Array<float> found(count, 0.0f);
  const bool overflow = chance(50);
  if (overflow) found[chance(20) ? count - 1 : below(count)] = chance(50) ? 1.0f : 3.0f;
  std::vector<const float*> pointers;
  for (const float& f : found) pointers.push_back(&f);
  Array<char> table(cuda::scaler_table_bytes(count));
  const ScalerState expected = transition(state[0], overflow, options);
  const int64_t before = launches();
  cuda::scaler_update(state.data(), pointers.data(), count, table.data(), options, nullptr);
  finish("an update of the scaler");
  if (table.empty()) require_one_launch(before, "more than one launch");
  require(std::memcmp(&expected, state.data(), sizeof expected) == 0, "another state");
}

// What just fits a launch's parameters, what just does not, and what lies a few beside; in turn.
int64_t around(int64_t most, int64_t nth) {
  const int64_t beside[] = {0, 1, -1, 2 + below(3), -2 - below(3)};
  return std::max<int64_t>(1, most + beside[nth % 5]);
}

bool run_case(const std::string& scenario, int64_t nth) {
  constexpr int64_t kRuleCount = std::size(kRules);
  const int rule = static_cast<int>(nth % kRuleCount);
  const int64_t round = nth / kRuleCount;  // of all rules
  play(1 + static_cast<int>(below(6)));
  if (scenario == "step") {
    step_case(rule, any_numels(1 + below(6), 6000), 1 + below(3));
  } else if (scenario == "one") {  // many thread blocks, one span
    play(12);
    step_case(rule, {chance(50) ? below(40000) : 1024 * below(30)}, 1);
  } else if (scenario == "limit") {
    const int64_t groups = chance(50) ? 1 + below(3) : 1 + below(most_groups());
    step_case(rule, any_numels(around(most_spans(groups), round), 20), groups);
  } else if (scenario == "limit-groups") {  // it is the rows of hyperparameters that are too many
    step_case(rule, any_numels(1, 20), around(most_groups(), round));
  } else if (scenario == "thousands") {
    step_case(rule, any_numels(3000, 8), 2);
  } else if (scenario == "empty") {
    step_case(rule, std::vector<int64_t>(1 + below(5), 0), 1);
  } else if (scenario == "statistics") {
    statistics_case(1 + below(6), 12000);
  } else if (scenario == "statistics-many") {
    statistics_case(chance(50) ? around(most_spans(0), nth) : 300 + below(2000), 30);
  } else if (scenario == "rows") {  // blocks' sums in several rows (csrc/math/squares.h), of a parameter and of a list
    play(12);
    if (nth % 2 == 0) step_case(find_rule("lamb"), {250'000 + below(300'000), below(2000)}, 1);
    if (nth % 2 == 1) statistics_case(1 + below(3), (1 + below(3)) << 20);
  } else if (scenario == "fold") {
    fold_case(nth % 2 ? below(70'000) : below(1000));
    if (nth % 20 == 0) fold_case(65'536 * below(4) + below(600));
  } else if (scenario == "accumulate") {
    accumulate_case(1 + below(6), 6000);
  } else if (scenario == "accumulate-many") {
    accumulate_case(chance(80) ? around(most_spans(0), nth) : 1500, 10);
  } else if (scenario == "scaler") {
    const int64_t counts[] = {1 + below(4), 1 + below(4), around(most_that_fit(cuda::scaler_table_bytes), nth / 4),
                              5000};
    scaler_case(counts[nth % 4]);
  } else {
    return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int64_t cases = std::atoll(argv[2]);
  random_bits.seed(std::atoll(argv[3]));
  try {
    for (int64_t nth = 0; nth < cases; ++nth) {
      if (!run_case(argv[1], nth)) return 2;
    }
  } catch (const std::exception& error) {  // of a launch
    std::fprintf(stderr, "%s: %s\n", doing.c_str(), error.what());
    std::fflush(nullptr);
    std::_Exit(kDeviceFailed);
  }
  std::printf("%lld cases\n", static_cast<long long>(cases));
}
