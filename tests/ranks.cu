// Collectives of several ranks of one device, in one cooperative launch, against csrc/math/collective.h: equal to the
// last bit. For a GPU, and with tests/cuda_on_host for the host, where sanitizers watch.
//
//     ranks CASES SEED
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../csrc/codec/half.h"
#include "../csrc/cpu/kernels.h"
#include "../csrc/cuda/collectives.h"

using namespace deepfast;
using cuda::Call;

namespace {

std::mt19937_64 random_bits;
std::string doing;  // for messages

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }
bool chance(int percent) { return below(100) < percent; }

void require(bool right, const std::string& what) {
  if (right) return;
  std::fprintf(stderr, "%s: %s\n", doing.c_str(), what.c_str());
  std::exit(1);
}

int64_t size_of(Element type) {
  const int64_t sizes[] = {4, 2, 2, 8, 4, 8};
  return sizes[static_cast<int>(type)];
}
bool is_float(Element type) { return type <= Element::kBFloat16; }

// Just as long as it has to be, `offset` elements after an aligned address.
struct Buffer {
  Element type;
  int64_t numel, lead;
  char* memory = nullptr;

  Buffer(Element type, int64_t numel, int64_t offset) : type(type), numel(numel), lead(offset * size_of(type)) {
    if (cudaMallocManaged(&memory, lead + numel * size_of(type) + (numel == 0)) != cudaSuccess) std::abort();
  }
  Buffer(Buffer&& other) : type(other.type), numel(other.numel), lead(other.lead), memory(other.memory) {
    other.memory = nullptr;
  }
  ~Buffer() { cudaFree(memory); }
  char* data() const { return memory + lead; }

  float get(int64_t i) const {
    if (type == Element::kFloat32) return reinterpret_cast<const float*>(data())[i];
    const uint16_t half = reinterpret_cast<const uint16_t*>(data())[i];
    return type == Element::kFloat16 ? Fp16::decode(half) : Bf16::decode(half);
  }
  void set(int64_t i, float x) const {
    if (type == Element::kFloat32) {
      reinterpret_cast<float*>(data())[i] = x;
    } else {
      reinterpret_cast<uint16_t*>(data())[i] =
          type == Element::kFloat16 ? Fp16::nearest_even(x) : Bf16::nearest_even(x);
    }
  }
  template <class T>
  T& as(int64_t i) const {
    return reinterpret_cast<T*>(data())[i];
  }
};

constexpr int kHuge = 38;

void fill(const Buffer& buffer, int exponent) {
  for (int64_t i = 0; i < buffer.numel; ++i) {
    double x = (static_cast<double>(below(1 << 24)) / (1 << 23) - 1) * std::pow(10.0, exponent);
    if (exponent == kHuge) x = chance(80) ? 3e38 : -3e38;  // sums that leave fp32's range
    if (is_float(buffer.type)) buffer.set(i, static_cast<float>(x));
    if (buffer.type == Element::kFloat64) buffer.as<double>(i) = x;
    if (buffer.type == Element::kInt32) buffer.as<int32_t>(i) = static_cast<int32_t>(random_bits());
    if (buffer.type == Element::kInt64) buffer.as<int64_t>(i) = static_cast<int64_t>(random_bits());
  }
  if (is_float(buffer.type) && buffer.numel > 0 && chance(10)) buffer.set(below(buffer.numel), INFINITY);
}

// The same few elements of all ranks: what is rare lies amid what is not.
void disturb(const std::vector<Buffer>& buffers) {
  const float values[] = {3e38f, -3e38f, -0.0f, INFINITY, NAN};
  for (int64_t left = below(4); left >= 0; --left) {
    const int64_t i = below(buffers[0].numel);
    const float x = values[below(5)];
    for (const Buffer& buffer : buffers) buffer.set(i, x);
  }
}

// to[at] = the sum over the ranks' from[index]. The oracle: plain loops.
void sum(const std::vector<Buffer>& from, int64_t index, const Buffer& to, int64_t at, double factor) {
  const int ranks = static_cast<int>(from.size());
  if (is_float(to.type)) {
    to.set(at, reduced([&](int r) { return from[r].get(index); }, ranks, static_cast<float>(factor)));
  } else if (to.type == Element::kFloat64) {
    double total = from[0].as<double>(index);
    for (int r = 1; r < ranks; ++r) total += from[r].as<double>(index);
    to.as<double>(at) = total * factor;
  } else if (to.type == Element::kInt32) {
    uint32_t total = 0;
    for (int r = 0; r < ranks; ++r) total += from[r].as<uint32_t>(index);
    to.as<uint32_t>(at) = total;
  } else {
    uint64_t total = 0;
    for (int r = 0; r < ranks; ++r) total += from[r].as<uint64_t>(index);
    to.as<uint64_t>(at) = total;
  }
}

bool same(double a, double b) { return a == b || (a != a && b != b); }

// Some ranks, and what they share.
struct Group {
  int ranks, meetings;
  std::vector<char*> shared;
  cuda::Status* status;

  Group(int ranks, int meetings) : ranks(ranks), meetings(meetings), shared(ranks) {
    for (char*& each : shared) {
      if (cudaMallocManaged(&each, cuda::kPeerBytes) != cudaSuccess) std::abort();
      std::memset(each, 0, cuda::kPeerBytes);
    }
    if (cudaMallocManaged(&status, ranks * sizeof *status) != cudaSuccess) std::abort();
    std::memset(status, 0, ranks * sizeof *status);
  }
  ~Group() {
    for (char* each : shared) cudaFree(each);
    cudaFree(status);
  }

  void launch(std::vector<Call>& calls) {
    for (int r = 0; r < ranks; ++r) {
      calls[r].rank = r;
      calls[r].ranks = ranks;
      calls[r].status = status + r;
      std::copy(shared.begin(), shared.end(), calls[r].shared);
    }
    cuda::collective(calls.data(), ranks, meetings, nullptr);
    require(cudaDeviceSynchronize() == cudaSuccess, "the device reports an error");
  }
};

void one_case(Group& group, bool in_agreement) {
  const int ranks = group.ranks;
  Call call = {};
  call.kind = static_cast<Call::Kind>(below(3));
  call.in = static_cast<Element>(below(6));
  call.out = call.in;
  if (call.kind != Call::kAllReduce && is_float(call.in) && chance(50)) {
    call.out = static_cast<Element>(below(3));
    // between floats of different widths, or the same type
    if (size_of(call.out) == size_of(call.in) && call.kind == Call::kReduceScatter) call.out = call.in;
  }
  const bool integer = call.in >= Element::kInt32;
  call.factor = integer || chance(30) || call.kind == Call::kAllGather ? 1.0 : chance(50) ? 1.0 / ranks : 0.37;
  const bool peer_memory = call.kind != Call::kAllReduce || chance(60);
  // A thread has four packs of 16 bytes under way, a thread block 1024; its chunks are of 131,072 elements.
  const int64_t most = chance(5)    ? 400000
                       : chance(20) ? 70000
                                    : 9000,
                kinds[] = {0,           1,          below(9), 4096, 4095 + below(3), 8192 * below(9) + below(19),
                           below(most), below(most)};
  call.numel = kinds[below(8)];
  if (!peer_memory) call.numel = std::min(call.numel, cuda::kOneShot / size_of(call.in));
  call.place = peer_memory ? 4096 * below(1000) : -1;
  const int64_t in_numel = call.kind == Call::kReduceScatter ? ranks * call.numel : call.numel;
  const int64_t out_numel = call.kind == Call::kAllGather ? ranks * call.numel : call.numel;
  const bool statistics = call.kind != Call::kAllGather && is_float(call.out) && chance(60);
  doing = "operation " + std::to_string(call.kind) + " of " + std::to_string(call.numel) + " elements, types " +
          std::to_string(static_cast<int>(call.in)) + " " + std::to_string(static_cast<int>(call.out)) + ", " +
          std::to_string(ranks) + " ranks, peer memory " + std::to_string(peer_memory);

  const int exponent = chance(10)   ? kHuge
                       : chance(70) ? static_cast<int>(below(5)) - 2
                                    : static_cast<int>(below(70)) - 34;
  const int64_t offset = chance(60) ? 0 : below(9);
  std::vector<Buffer> inputs, outputs, expected;
  for (int r = 0; r < ranks; ++r) {
    inputs.emplace_back(call.in, in_numel, offset);
    fill(inputs.back(), exponent);
    outputs.emplace_back(call.out, call.kind == Call::kAllReduce ? 0 : out_numel, chance(60) ? 0 : below(9));
    expected.emplace_back(call.out, out_numel, 0);
  }
  if (is_float(call.in) && in_numel > 0 && chance(30)) disturb(inputs);
  for (int r = 0; r < ranks; ++r) {
    for (int64_t i = 0; i < out_numel; ++i) {
      if (call.kind == Call::kAllReduce) sum(inputs, i, expected[r], i, call.factor);
      if (call.kind == Call::kReduceScatter) sum(inputs, r * call.numel + i, expected[r], i, call.factor);
      if (call.kind != Call::kAllGather) continue;
      const Buffer& from = inputs[i / call.numel];
      const int64_t at = i % call.numel, size = size_of(call.in);
      if (call.in == call.out) {
        std::memcpy(expected[r].data() + i * size, from.data() + at * size, size);
      } else {
        expected[r].set(i, from.get(at));
      }
    }
  }
  std::vector<Call> calls(ranks, call);
  Statistics* told;
  float* found;
  if (cudaMallocManaged(&told, ranks * sizeof *told) != cudaSuccess) std::abort();
  if (cudaMallocManaged(&found, ranks * sizeof *found) != cudaSuccess) std::abort();
  for (int r = 0; r < ranks; ++r) {
    found[r] = 0.0f;
    calls[r].input = inputs[r].data();
    calls[r].output = call.kind == Call::kAllReduce ? inputs[r].data() : outputs[r].data();
    for (int other = 0; other < ranks; ++other) calls[r].data[other] = inputs[other].data();
    if (statistics) {
      calls[r].statistics = told + r;
      calls[r].found_inf = found + r;
    }
  }
  if (!in_agreement) calls[ranks - 1].factor += 1.0;
  group.launch(calls);
  for (int r = 0; r < ranks; ++r) {
    const cuda::Status& status = group.status[r];
    if (!in_agreement) {
      require(ranks == 1 || status.disagree == 1, "nobody has noticed that the ranks do different things");
      if (statistics && ranks > 1) require(found[r] == 1.0f && told[r].non_finite > 0, "a step would not be skipped");
      continue;
    }
    require(status.disagree == 0 && status.begun == status.ended, "the ranks say they do not do the same");
    const Buffer& got = call.kind == Call::kAllReduce ? inputs[r] : outputs[r];
    const int64_t size = size_of(call.out);
    for (int64_t i = 0; i < out_numel; ++i) {
      const bool equal = std::memcmp(got.data() + i * size, expected[r].data() + i * size, size) == 0;
      const bool nan = is_float(call.out) && got.get(i) != got.get(i) && expected[r].get(i) != expected[r].get(i);
      require(equal || nan, "rank " + std::to_string(r) + " differs at element " + std::to_string(i));
    }
    if (!statistics) continue;
    Span span = {};
    span.grad = got.data();
    span.grad_dtype = static_cast<DType>(call.out);
    span.numel = out_numel;
    const Statistics right = cpu::statistics(&span, 1);
    require(same(told[r].sum_of_squares, right.sum_of_squares) && told[r].non_finite == right.non_finite,
            "other statistics on rank " + std::to_string(r));
    require(found[r] == (right.non_finite > 0 ? 1.0f : 0.0f), "found_inf is wrong");
  }
  cudaFree(told);
  cudaFree(found);
}

// A rank that never comes, and a host that gives up: nobody hangs, and the missing one is known.
void a_missing_rank() {
  doing = "a rank that does not come";
  Group group(1, 3);
  Group other(1, 3);
  group.shared.push_back(other.shared[0]);
  Buffer data(Element::kFloat32, 5000, 0);
  fill(data, 0);
  const std::vector<float> before(&data.as<float>(0), &data.as<float>(0) + 5000);
  std::vector<Call> calls(1);
  calls[0].kind = Call::kAllReduce;
  calls[0].input = calls[0].output = data.data();
  calls[0].numel = 5000;
  calls[0].place = 0;
  calls[0].factor = 1.0;
  calls[0].data[0] = calls[0].data[1] = data.data();
  float* found;
  if (cudaMallocManaged(&found, sizeof *found) != cudaSuccess) std::abort();
  *found = 0.0f;
  calls[0].found_inf = found;
  calls[0].ranks = 2;
  calls[0].status = group.status;
  std::copy(group.shared.begin(), group.shared.end(), calls[0].shared);
  group.status->give_up = 1;
  cuda::collective(calls.data(), 1, 3, nullptr);
  require(cudaDeviceSynchronize() == cudaSuccess, "the device reports an error");
  require(group.status->missing[1] == 1 && group.status->missing[0] == 0, "not rank 1 is missing");
  require(*found == 1.0f, "a step would not be skipped");
  // What was queued behind it must fail as well, and look to nobody like this rank's part of something.
  *group.status = {};
  *found = 0.0f;
  const auto& theirs = *reinterpret_cast<const cuda::Shared*>(other.shared[0]);
  const uint32_t told = theirs.meeting[0].arrived[0];
  calls[0].place = -1;
  cuda::collective(calls.data(), 1, 3, nullptr);
  require(cudaDeviceSynchronize() == cudaSuccess, "the device reports an error");
  require(*found == 1.0f, "the next step would not be skipped");
  require(theirs.meeting[0].arrived[0] == told, "the other rank is told of an operation that is none");
  for (int64_t i = 0; i < 5000; ++i) require(data.as<float>(i) == before[i], "something was written");
  cudaFree(found);
  group.shared.pop_back();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int64_t cases = std::atoll(argv[1]);
  random_bits.seed(std::atoll(argv[2]));
  a_missing_rank();
  for (int64_t nth = 0; nth < cases;) {
    const int ranks = static_cast<int>(chance(4) ? 5 + below(4) : 1 + below(4));
    Group group(ranks, 1 + static_cast<int>(below(8)));
    for (int64_t row = 1 + below(12); row > 0 && nth < cases; --row, ++nth) one_case(group, true);
    if (chance(10)) one_case(group, false);
  }
  std::printf("%lld cases\n", static_cast<long long>(cases));
}
