// All-reduce, reduce-scatter and all-gather over peer memory.
#include "peers.cuh"
#include "reduce.cuh"

namespace deepfast::cuda {
namespace {

template <class T>
constexpr bool kIsFloat = std::is_same_v<T, float> || std::is_same_v<T, Half>;

template <class Out, class Sum>
__device__ Out stored(Sum x, DType dtype) {
  if constexpr (std::is_same_v<Out, Half>) {
    return encode<false>(x, dtype);
  } else {
    return static_cast<Out>(x);
  }
}

template <class In, class Out>
constexpr int kWidth = 16 / (sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out));

// The same elements of all ranks.
template <class In>
struct Sources {
  char* const* base;  // [ranks]
  int64_t offset;     // bytes
  int ranks;
  DType dtype;

  __device__ const In* of(int rank) const { return reinterpret_cast<const In*>(base[rank] + offset); }

  // Elements i .. i + kSize summed in rank order, times factor; as csrc/math/collective.h has it.
  template <int kSize>
  __device__ auto sum(int64_t i, double factor) const {
    using Sum = decltype(decode(In(), dtype));
    Pack<Sum, kSize> total;
#pragma unroll(kSize > 1 ? 4 : 1)
    for (int r = 0; r < ranks; ++r) {
      const Pack<In, kSize> x = load<kSize>(of(r) + i);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const Sum value = decode(x[j], dtype);
        total[j] = r == 0 ? value : total[j] + value;
      }
    }
    if constexpr (std::is_same_v<Sum, double>) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) total[j] *= factor;
    }
    if constexpr (std::is_same_v<Sum, float>) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        total[j] *= static_cast<float>(factor);
        if (!is_finite(total[j])) {
          const auto again = [&](int r) { return decode(of(r)[i + j], dtype); };
          total[j] = reduced(again, ranks, static_cast<float>(factor));
        }
      }
    }
    return total;
  }
};

// Where a result goes: to this rank alone, or to the same place on all.
template <class Out>
struct Targets {
  Out* own;
  char* const* everywhere;  // [ranks], or null
  int ranks;
  DType dtype;

  template <int kSize>
  __device__ void put(int64_t i, const Pack<Out, kSize>& x) const {
    if (everywhere) {
      for (int r = 0; r < ranks; ++r) store<kSize>(reinterpret_cast<Out*>(everywhere[r]) + i, x);
    } else {
      store<kSize>(own + i, x);
    }
  }
};

// The elements [begin, end), by one thread block; begin is a multiple of kReadBlock. tell(block, sum): of the squares
// of what was stored, block by block, where `measure` says that they are wanted.
template <class In, class Out, class Tell>
__device__ void reduce(const Sources<In>& from, const Targets<Out>& to, double factor, int64_t begin, int64_t end,
                       bool aligned, bool measure, const Tell& tell) {
  constexpr int kSize = kWidth<In, Out>;
  const int phase = aligned ? 0 : -1;
  const auto step = [&](int64_t i, auto size) {
    const auto sum = from.template sum<size.value>(i, factor);
    Pack<Out, size.value> out;
#pragma unroll
    for (int j = 0; j < size.value; ++j) out[j] = stored<Out>(sum[j], to.dtype);
    to.template put<size.value>(i, out);
    return out;
  };
  if constexpr (kIsFloat<Out>) {
    if (measure) {
      const Group<kSize> group;
      for (int64_t block = begin / kReadBlock + group.index; block * kReadBlock < end; block += group.kGroups) {
        const int64_t at = block * kReadBlock, n = min(static_cast<int64_t>(kReadBlock), end - at);
        Lane lanes[kSize] = {};
        group.template for_each<2>(at, n, phase, [&](int64_t i, int j, auto size) {
          const auto out = step(i, size);
#pragma unroll
          for (int k = 0; k < size.value; ++k) lanes[j + k].add(decode(out[k], to.dtype));
        });
        const double sum = group.total(lanes, [&](double (&sums)[kSize]) {
          group.template for_each<1>(at, n, phase, [&](int64_t i, int j, auto size) {
            const auto out = load<size.value>(to.own + i);  // what this very thread has stored
#pragma unroll
            for (int k = 0; k < size.value; ++k) {
              const double x = decode(out[k], to.dtype);
              sums[j + k] += x * x;
            }
          });
        });
        if (group.member == 0) tell(block, sum);
      }
      return;
    }
  }
  for_each<kSize>(begin, end, phase, step);
}

// to[n] = from[n] by one thread block, its share of the whole.
template <class In, class Out>
__device__ void convert(const In* from, DType in, Out* to, DType out, int64_t begin, int64_t end, bool aligned) {
  for_each<kWidth<In, Out>>(begin, end, aligned ? 0 : -1, [&](int64_t i, auto size) {
    const auto x = load<size.value>(from + i);
    Pack<Out, size.value> y;
#pragma unroll
    for (int j = 0; j < size.value; ++j) {
      if constexpr (std::is_same_v<In, Out>) {
        y[j] = in == out ? x[j] : stored<Out>(decode(x[j], in), out);
      } else {
        y[j] = stored<Out>(decode(x[j], in), out);
      }
    }
    store<size.value>(to + i, y);
  });
}

// This thread block's share of a portion: whole blocks of the statistics.
__device__ Portion share_of(const Portion& portion) {
  const Portion mine = portion_of(portion.end - portion.begin, blockIdx.x, gridDim.x);
  return {portion.begin + mine.begin, portion.begin + mine.end};
}

// False: the ranks did not come, or do not do the same.
template <class In, class Out>
__device__ bool run(const Call& call, Meetings& meetings) {
  const int rank = call.rank, ranks = call.ranks;
  const int64_t numel = call.numel;
  const In* input = static_cast<const In*>(call.input);
  Out* output = static_cast<Out*>(call.output);
  const DType in = static_cast<DType>(call.in), out = static_cast<DType>(call.out);
  const auto is_aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  const bool aligned = is_aligned(input) && is_aligned(output);
  const bool one_shot = call.kind == Call::kAllReduce && call.place < 0;
  const bool two_shot = call.kind == Call::kAllReduce && !one_shot;
  const Portion mine = share_of(two_shot ? portion_of(numel, rank, ranks) : Portion{0, numel});

  if (__syncthreads_or(meetings.own.broken)) return false;  // another thread block may be setting it
  if constexpr (std::is_same_v<In, Out>) {
    In* shown = reinterpret_cast<In*>(meetings.stage(rank));
    if (one_shot) convert(input, in, shown, in, mine.begin, mine.end, aligned);
  }
  if (!meetings.begin()) return false;
  if (call.kind == Call::kAllGather) {
    for (int r = 0; r < ranks; ++r) {
      Out* to = output + r * numel;
      convert(reinterpret_cast<const In*>(call.data[r]), in, to, out, mine.begin, mine.end, aligned && is_aligned(to));
    }
  } else {
    const int64_t part = call.kind == Call::kReduceScatter ? rank * numel * static_cast<int64_t>(sizeof(In)) : 0;
    const Sources<In> from = {one_shot ? call.shared : call.data, one_shot ? meetings.stage(0) - call.shared[0] : part,
                              ranks, in};
    const Targets<Out> to = {output, two_shot ? call.data : nullptr, ranks, out};
    reduce(from, to, call.factor, mine.begin, mine.end, aligned && part % 16 == 0, call.measured(),
           [&](int64_t block, double sum) {
             for (int r = 0; r < ranks; ++r) {
               if (two_shot || r == rank) meetings.sums(r)[block] = sum;
             }
           });
  }
  return one_shot || meetings.meet();  // until then nobody may touch what another reads or writes
}

struct Calls {
  Call call[kMostTogether];
};

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, 1) collective_kernel(const __grid_constant__ Calls calls) {
  const Call& call = calls.call[blockIdx.y];
  Meetings meetings(call);
  if (!run<In, Out>(call, meetings)) {  // nothing was done: a step that asks the statistics must be skipped
    if (threadIdx.x == 0) {
      meetings.fail();
      if (call.statistics) *call.statistics = {INFINITY, 1.0};
      if (call.found_inf) *call.found_inf = 1.0f;
    }
    return;
  }
  if (!meetings.end()) return;
  if constexpr (kIsFloat<Out>) {
    if (!call.measured()) return;
    const int64_t blocks = (call.numel + kReadBlock - 1) / kReadBlock;
    const Statistics total = fold<Statistics>(meetings.sums(call.rank), blocks);
    if (threadIdx.x == 0) {
      if (call.statistics) *call.statistics = total;
      if (call.found_inf && total.non_finite > 0) *call.found_inf = 1.0f;
    }
  }
}

template <class In, class Out>
void launch_together(const Call* calls, int count, int grid, Stream stream) {
  Calls together = {};
  std::copy(calls, calls + count, together.call);
  launch(collective_kernel<In, Out>, dim3(grid, count), kThreads, stream, together);
}

}  // namespace

void collective(const Call* calls, int count, int meetings, Stream stream) {
  const Call& call = calls[0];
  const bool gathers = call.kind == Call::kAllGather;
  const int64_t portion =
      call.kind == Call::kAllReduce && call.place >= 0 ? (call.numel + call.ranks - 1) / call.ranks : call.numel;
  // A block of the statistics is a few threads' work, or a whole thread block's where they are not wanted.
  const bool measure = !gathers && call.measured();
  const int64_t blocks = (portion + kReadBlock - 1) / kReadBlock, each = measure ? 4 : 1;
  const int grid = static_cast<int>(std::clamp<int64_t>((blocks + each - 1) / each, 1, std::min(meetings, kMeetings)));
  const auto go = [&]<class In, class Out>() { launch_together<In, Out>(calls, count, grid, stream); };
  const auto is_half = [](Element type) { return type == Element::kFloat16 || type == Element::kBFloat16; };
  if (call.in == Element::kFloat64) return go.operator()<double, double>();
  if (call.in == Element::kInt32) return go.operator()<int32_t, int32_t>();
  if (call.in == Element::kInt64) return go.operator()<int64_t, int64_t>();
  if (is_half(call.in)) {
    return is_half(call.out) ? go.operator()<Half, Half>() : go.operator()<Half, float>();
  }
  return is_half(call.out) ? go.operator()<float, Half>() : go.operator()<float, float>();
}

}  // namespace deepfast::cuda
