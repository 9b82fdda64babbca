// The CUDA kernels, run on the host, against the CPU kernels: equal to the last bit, over random lists of spans.
//
//     harness SCENARIO CASES SEED
//
// Every buffer is allocated by itself and just as long as it has to be, so that the address sanitizer sees any access
// beside it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/codec/half.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/kernels.h"
#include "cuda_runtime.h"

using namespace deepfast;

namespace {

std::mt19937_64 random_bits;
std::string doing;  // for messages

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }
bool chance(int percent) { return below(100) < percent; }
float uniform() { return static_cast<float>(below(1 << 24)) / (1 << 24) * 2 - 1; }

void require(bool right, const std::string& what) {
  if (right) return;
  std::fprintf(stderr, "%s: %s\n", doing.c_str(), what.c_str());
  std::exit(1);
}

// Some elements of a width, `offset` elements after a boundary of 64 bytes.
struct Buffer {
  int64_t numel, width;
  size_t lead;
  std::unique_ptr<char, decltype(&std::free)> memory;

  Buffer(int64_t numel, int64_t width, int64_t offset)
      : numel(numel), width(width), lead(offset * width), memory(nullptr, &std::free) {
    void* at = nullptr;
    if (posix_memalign(&at, 64, lead + numel * width + (numel == 0)) != 0) std::abort();
    memory.reset(static_cast<char*>(at));
  }
  Buffer copy() const {
    Buffer other(numel, width, lead / width);
    std::memcpy(other.data(), data(), numel * width);
    return other;
  }
  char* data() const { return memory.get() + lead; }
  bool operator==(const Buffer& other) const { return std::memcmp(data(), other.data(), numel * width) == 0; }
};

// What the numbers of a case are like.
struct Taste {
  int exponent = 0;       // decimal, of all
  int poison = 0;         // percent of spans that hold an inf or NaN somewhere
  bool any_bits = false;  // any bit pattern whatever
};

void fill(const Buffer& buffer, DType dtype, const Taste& taste, bool positive = false) {
  for (int64_t i = 0; i < buffer.numel; ++i) {
    float x = uniform() * std::pow(10.0f, static_cast<float>(taste.exponent));
    if (positive) x = std::fabs(x);
    if (chance(2)) x = chance(50) ? 0.0f : -0.0f;
    uint32_t bits = to_bits(x);
    if (taste.any_bits) bits = static_cast<uint32_t>(random_bits());
    if (dtype == DType::kFloat32) {
      std::memcpy(buffer.data() + 4 * i, &bits, 4);
    } else {
      uint16_t half = dtype == DType::kFloat16 ? Fp16::nearest_even(x) : Bf16::nearest_even(x);
      if (taste.any_bits) half = static_cast<uint16_t>(bits);
      std::memcpy(buffer.data() + 2 * i, &half, 2);
    }
  }
  if (taste.poison > 0 && buffer.numel > 0 && chance(taste.poison)) {
    const float inf = INFINITY, bad[] = {inf, -inf, NAN};
    const float x = bad[below(3)];
    const int64_t i = below(buffer.numel);
    const uint16_t half = dtype == DType::kFloat16 ? Fp16::nearest_even(x) : Bf16::nearest_even(x);
    std::memcpy(buffer.data() + buffer.width * i, dtype == DType::kFloat32 ? static_cast<const void*>(&x) : &half,
                buffer.width);
  }
}

int64_t width_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
DType any_dtype() { return static_cast<DType>(below(3)); }

// The same spans twice: for the CPU, and for the device that is played.
struct Twins {
  std::vector<Buffer> cpu, cuda;
  std::vector<Span> on_cpu, on_cuda;
  std::vector<std::string> names;

  // One buffer a side; the span's pointer to it on each.
  template <class Pointer>
  void add(Buffer buffer, Pointer Span::* field, Span& a, Span& b, const char* name) {
    set(a.*field, b.*field, std::move(buffer), name);
  }
  template <class Pointer>
  void set(Pointer& a, Pointer& b, Buffer buffer, const char* name) {
    cuda.push_back(buffer.copy());
    cpu.push_back(std::move(buffer));
    a = reinterpret_cast<Pointer>(cpu.back().data());
    b = reinterpret_cast<Pointer>(cuda.back().data());
    names.push_back(std::string(name) + " of span " + std::to_string(on_cpu.size()));
  }
  void compare(const char* when) const {
    for (size_t i = 0; i < cpu.size(); ++i) {
      if (cpu[i] == cuda[i]) continue;
      int64_t at = 0;
      const int64_t width = cpu[i].width;
      while (std::memcmp(cpu[i].data() + at * width, cuda[i].data() + at * width, width) == 0) ++at;
      require(false, names[i] + " differs " + when + " from element " + std::to_string(at) + " of " +
                         std::to_string(cpu[i].numel) + " on");
    }
  }
};

int64_t any_numel(int64_t most) {
  switch (below(8)) {
    case 0:
      return 0;
    case 1:
      return 1;
    case 2:
      return below(8);
    case 3:
      return std::min<int64_t>(most, 1024 * (1 + below(3)) - 3 + below(7));
    case 4:
      return std::min<int64_t>(most, 4096 * (1 + below(2)) - 3 + below(7));
    default:
      return below(most + 1);
  }
}

// Streams of a span begin at the same offset from an aligned element, or each at its own.
struct Offsets {
  const bool common = chance(60);
  const int64_t offset = chance(50) ? 0 : below(8);
  int64_t operator()() const { return common ? offset : below(8); }
};

Taste any_taste() {
  Taste taste;
  taste.exponent = chance(70) ? static_cast<int>(below(5)) - 2 : static_cast<int>(below(60)) - 36;
  taste.poison = chance(20) ? 30 : 0;
  taste.any_bits = chance(5);
  return taste;
}

void add_span(Twins& twins, int rule, int64_t numel, const Taste& taste, int64_t groups) {
  Span a = {}, b = {};
  const Offsets offset;
  a.numel = numel;
  a.param_dtype = any_dtype();
  a.grad_dtype = chance(70) ? a.param_dtype : any_dtype();
  a.group = static_cast<int32_t>(below(groups));
  b = a;
  const auto stream = [&](auto Span::* field, DType dtype, const char* name, bool positive = false) {
    Buffer buffer(numel, width_of(dtype), offset());
    fill(buffer, dtype, taste, positive);
    twins.add(std::move(buffer), field, a, b, name);
  };
  stream(&Span::param, a.param_dtype, "param");
  stream(&Span::grad, a.grad_dtype, "grad");
  if (a.param_dtype != DType::kFloat32 && chance(70)) stream(&Span::master, DType::kFloat32, "master");
  for (int k = 0; k < kRules[rule].moments; ++k) {
    Buffer buffer(numel, 4, offset());
    fill(buffer, DType::kFloat32, taste, k > 0 || kRules[rule].moments == 1);
    twins.set(a.moment[k], b.moment[k], std::move(buffer), "a moment");
  }
  if (kRules[rule].counts_steps) {
    Buffer step(1, 4, 0);
    const float count = chance(30) ? 0.0f : chance(5) ? 0x1p24f : static_cast<float>(below(100000));
    std::memcpy(step.data(), &count, 4);
    twins.add(std::move(step), &Span::step, a, b, "the step count");
  }
  twins.on_cpu.push_back(a);
  twins.on_cuda.push_back(b);
}

// Hyperparameters for both sides; on the device, some learning rates are read from memory.
struct Hypers {
  std::vector<double> table;
  std::vector<cuda::Hyper> rows;
  std::vector<double> wide;
  std::vector<float> narrow;
  int64_t stride;

  Hypers(int rule, int64_t groups) : stride(kRules[rule].hyper) {
    const std::string name = kRules[rule].name;
    wide.resize(groups);
    narrow.resize(groups);
    for (int64_t g = 0; g < groups; ++g) {
      const auto below_one = [] { return chance(10) ? 0.0 : 1.0 - std::pow(10.0, -4.0 * std::fabs(uniform())); };
      const double lr = chance(10) ? 0.0 : std::fabs(uniform()) * 0.1, decay = chance(40) ? 0.0 : std::fabs(uniform());
      const double sign = chance(30) ? -1.0 : 1.0, eps = std::pow(10.0, -2 - 10.0 * std::fabs(uniform()));
      std::vector<double> row;
      if (name.starts_with("adam")) row = {lr, below_one(), below_one(), eps, decay, chance(30) ? 0.1 : 0.0};
      if (name.starts_with("sgd")) row = {lr, below_one(), chance(50) ? 0.0 : 0.5, decay, chance(50) ? 1.0 : 0.0};
      if (name == "lion") row = {lr, below_one(), below_one(), decay};
      if (name == "lamb") row = {lr, below_one(), below_one(), eps, decay, 0.0, chance(50) ? 10.0 : INFINITY};
      if (name == "adagrad") row = {lr, chance(50) ? 0.0 : 0.5, decay, eps};
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
  Buffer partial, counters, table, sent;
  cuda::Workspace workspace;
  const bool known = chance(70);  // what the table holds is remembered

  Memory(int64_t partials, int64_t width, int64_t counter_count, int64_t table_bytes)
      : partial(partials, width, 0), counters(counter_count, 4, 0), table(table_bytes, 1, 0), sent(table_bytes, 1, 0) {
    std::memset(counters.data(), 0, counter_count * 4);
    std::memset(sent.data(), 0xff, table_bytes);
    workspace = {partial.data(), reinterpret_cast<uint32_t*>(counters.data()), table_bytes ? table.data() : nullptr,
                 table_bytes && known ? sent.data() : nullptr};
  }
  void check() const {
    for (int64_t i = 0; i < counters.numel; ++i) {
      require(reinterpret_cast<uint32_t*>(counters.data())[i] == 0, "a counter is not left at zero");
    }
  }
};

StepRecord any_record() { return {chance(30) ? 1.0f : std::fabs(uniform()) * 2, chance(15) ? 2.0f : 0.0f, 0.0f}; }

// Steps in a row over one list of spans; from step to step the gradients move, as they do in life.
void step_case(int rule, const std::vector<int64_t>& numels, int64_t groups) {
  doing = std::string(kRules[rule].name) + ", " + std::to_string(numels.size()) + " spans";
  Twins twins;
  const Taste taste = any_taste();
  for (int64_t numel : numels) add_span(twins, rule, numel, taste, groups);
  const int64_t count = numels.size();
  const Hypers hypers(rule, groups);
  const bool reset = chance(50);
  cuda::Job job = {twins.on_cuda.data(), count, hypers.rows.data(), groups};
  const Memory steps(0, 1, cuda::kStepCounters, cuda::table_bytes(job));
  const Memory measures(cuda::norms_partials(job), sizeof(Norms), count, cuda::table_bytes(job));
  for (int nth = 0; nth < 2; ++nth) {
    if (nth > 0) {
      for (int64_t s = 0; s < count; ++s) {
        if (chance(50)) continue;
        Buffer moved(twins.on_cpu[s].numel, width_of(twins.on_cpu[s].grad_dtype), below(4));
        fill(moved, twins.on_cpu[s].grad_dtype, taste);
        twins.add(std::move(moved), &Span::grad, twins.on_cpu[s], twins.on_cuda[s], "a moved grad");
      }
    }
    const StepRecord record = any_record();
    std::vector<Norms> expected(count), got(count);
    if (kRules[rule].needs_norms) {
      cpu::norms(rule, twins.on_cpu.data(), count, hypers.table.data(), hypers.stride, record, expected.data());
      cuda::norms(rule, job, measures.workspace, &record, got.data(), nullptr);
      measures.check();
      for (int64_t s = 0; s < count; ++s) {
        const auto same = [](double a, double b) { return a == b || (a != a && b != b); };
        require(same(expected[s].param, got[s].param) && same(expected[s].direction, got[s].direction),
                "other norms for span " + std::to_string(s));
      }
      twins.compare("after the first pass");
    }
    cpu::step(rule, twins.on_cpu.data(), count, hypers.table.data(), hypers.stride, record, expected.data(), reset);
    const int64_t before = cuda_on_host::launches;
    cuda::step(rule, job, steps.workspace, &record, got.data(), reset, nullptr);
    require(cuda_on_host::launches - before == 1 || cuda::table_bytes(job) > 0, "more than one launch");
    steps.check();
    twins.compare("after a step");
  }
  if (cuda::table_bytes(job) > 0 && steps.known) {  // nothing has changed: nothing is to be sent
    const StepRecord skip = {1.0f, 1.0f, 0.0f};
    const int64_t before = cuda_on_host::launches;
    cuda::step(rule, job, steps.workspace, &skip, nullptr, false, nullptr);
    require(cuda_on_host::launches - before == 1, "an unchanged table was sent again");
  }
}

std::vector<int64_t> any_numels(int64_t count, int64_t most) {
  std::vector<int64_t> numels(count);
  for (int64_t& numel : numels) numel = any_numel(most);
  return numels;
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
    buffers.emplace_back(span.numel, width_of(span.grad_dtype), Offsets()());
    fill(buffers.back(), span.grad_dtype, taste);
    span.grad = buffers.back().data();
  }
  const cuda::Job job = {spans.data(), count, nullptr, 0};
  const Memory memory(cuda::statistics_partials(job), sizeof(double), 1, cuda::table_bytes(job));
  const float scale = chance(50) ? 1.0f : 65536.0f, found = chance(20) ? 2.0f : 0.0f;
  const float max_norm = chance(50) ? 0.0f : std::fabs(uniform());
  const bool check = chance(50);
  const cuda::Question question = {scale == 1.0f ? nullptr : &scale, found == 0.0f ? nullptr : &found, max_norm, check};
  Statistics got = {};
  StepRecord record = {}, again = {};
  const int64_t before = cuda_on_host::launches;
  cuda::statistics(job, memory.workspace, &got, &record, question, nullptr);
  require(cuda_on_host::launches - before == 1 || cuda::table_bytes(job) > 0, "more than one launch");
  memory.check();
  const Statistics expected = cpu::statistics(spans.data(), count);
  const auto same = [](double a, double b) { return a == b || (a != a && b != b); };
  require(same(expected.sum_of_squares, got.sum_of_squares), "another sum of squares");
  require(expected.non_finite == got.non_finite, "another number of blocks that are not finite");
  const StepRecord decided = decide(expected, scale, found, max_norm, check);
  cuda::decide(&again, &got, question, nullptr);
  for (const StepRecord& r : {record, again}) {
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
    Buffer sum(a.numel, 4, offset()), grad(a.numel, width_of(a.grad_dtype), offset());
    fill(sum, DType::kFloat32, taste);
    fill(grad, a.grad_dtype, taste);
    twins.add(std::move(sum), &Span::param, a, b, "the sum");
    twins.add(std::move(grad), &Span::grad, a, b, "grad");
    twins.on_cpu.push_back(a);
    twins.on_cuda.push_back(b);
  }
  const cuda::Job job = {twins.on_cuda.data(), count, nullptr, 0};
  const Memory memory(0, 1, 0, cuda::table_bytes(job));
  for (const bool overwrite : {true, false}) {
    const float weight = uniform();
    cpu::accumulate(twins.on_cpu.data(), count, weight, overwrite);
    cuda::accumulate(job, memory.workspace, weight, overwrite, nullptr);
    twins.compare(overwrite ? "after the first" : "after the second");
  }
}

void scaler_case(int64_t count) {
  doing = "the scaler";
  ScalerState state = {std::ldexp(1.0f, static_cast<int>(below(30)) - 3), static_cast<float>(below(5)),
                       static_cast<float>(below(3)), static_cast<float>(below(3))};
  const ScalerOptions options = {2.0, 0.5, 1 + below(5), 1 + below(3), chance(50), chance(90), 1.0, 16777216.0};
  std::vector<float> found(count, 0.0f);
  const bool overflow = chance(50);
  if (overflow) found[below(count)] = chance(50) ? 1.0f : 3.0f;
  std::vector<const float*> pointers;
  for (const float& f : found) pointers.push_back(&f);
  const Buffer table(cuda::scaler_table_bytes(count), 1, 0);
  const ScalerState expected = transition(state, overflow, options);
  cuda::scaler_update(&state, pointers.data(), count, table.data(), options, nullptr);
  require(std::memcmp(&expected, &state, sizeof state) == 0, "another state");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::string scenario = argv[1];
  const int64_t cases = std::atoll(argv[2]);
  random_bits.seed(std::atoll(argv[3]));
  constexpr int64_t kRuleCount = std::size(kRules);
  for (int64_t nth = 0; nth < cases; ++nth) {
    cuda_on_host::processors = 1 + static_cast<int>(below(6));
    const int rule = static_cast<int>(nth % kRuleCount);
    if (scenario == "step") {
      step_case(rule, any_numels(1 + below(6), 6000), 1 + below(3));
    } else if (scenario == "one") {  // many thread blocks, one span
      cuda_on_host::processors = 12;
      step_case(rule, {chance(50) ? below(40000) : 1024 * below(30)}, 1);
    } else if (scenario == "overflow") {  // the table is longer than a launch's parameters
      step_case(rule, any_numels(380 + below(80), 20), chance(50) ? 1 + below(3) : 1 + below(300));
    } else if (scenario == "thousands") {
      step_case(rule, any_numels(3000, 8), 2);
    } else if (scenario == "empty") {
      step_case(rule, std::vector<int64_t>(1 + below(5), 0), 1);
    } else if (scenario == "statistics") {
      statistics_case(1 + below(6), 12000);
    } else if (scenario == "statistics-many") {
      statistics_case(300 + below(2000), 30);
    } else if (scenario == "accumulate") {
      chance(90) ? accumulate_case(1 + below(6), 6000) : accumulate_case(700, 10);
    } else if (scenario == "scaler") {
      scaler_case(chance(80) ? 1 + below(4) : 5000);
    } else {
      return 2;
    }
  }
  std::printf("%lld cases, %lld launches\n", static_cast<long long>(cases),
              static_cast<long long>(cuda_on_host::launches));
}
