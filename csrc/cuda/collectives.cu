// All-reduce, reduce-scatter and all-gather over peer memory.
#include "peers.cuh"
#include "reduce.cuh"

namespace deepfast::cuda {
namespace {

static_assert(kProcessors * kResident >= kMeetings);

template <class T>
constexpr bool kIsFloat = std::is_same_v<T, float> || std::is_same_v<T, Half>;

template <class Sum>
constexpr Sum kNothing = static_cast<Sum>(-0.0);  // what changes no sum, not even that of negative zeros

inline __device__ float scaled(float sum, double factor) { return sum * static_cast<float>(factor); }
inline __device__ double scaled(double sum, double factor) { return sum * factor; }
template <class Integer>
__device__ Integer scaled(Integer sum, double) {
  return sum;
}

template <class Out, class Sum>
__device__ Out stored(Sum x, DType dtype) {
  if constexpr (std::is_same_v<Out, Half>) {
    return encode<false>(x, dtype);
  } else {
    return static_cast<Out>(x);
  }
}

// What a thread block does at once, in elements: so much that all threads have something to do, so little that what it
// has written still lies in the cache where it is read again, to be measured.
constexpr int kChunk = 32 * kReadBlock;

// The elements [0, n) of a chunk. A link is full when enough of it is under way: a thread has kPacks packs at once,
// each kThreads packs after the one before. batch(first, whole): as many whole packs as there are, the first at element
// `first`; it returns those that are done, as bits. one(i): an element of what is left, which is rare.
template <int kSize, int kPacks, class Batch, class One>
__device__ void for_each_batch(int n, bool aligned, const Batch& batch, const One& one) {
  constexpr int kApart = kThreads * kSize;
#pragma unroll 1
  for (int at = 0; at < n; at += kPacks * kApart) {
    const int first = at + threadIdx.x * kSize;
    const uint32_t done = batch(first, aligned ? min((n - first + kApart - kSize) / kApart, kPacks) : 0);
    if (done == (1u << kPacks) - 1) continue;
    const int begin = aligned ? first : at + threadIdx.x, step = aligned ? 1 : kThreads;
#pragma unroll 1
    for (int nth = 0; nth < kPacks * kSize; ++nth) {
      const int i = begin + nth / kSize * kApart + nth % kSize * step;
      if (i < n && !(done >> nth / kSize & 1)) one(i);
    }
  }
}

// The compiler would keep the address of each pack, not that of the first and the distances.
template <class T>
__device__ T* opaque(T* at) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(at));
#endif
  return at;
}

// Packs of a thread, kApart elements apart. Those of one load are all under way before the first is used.
template <class T, int kSize, int kPacks, int kApart = kThreads * kSize>
struct Packs {
  using Word = std::conditional_t<sizeof(T) == 2, uint32_t, T>;  // 16 bits alone would fill a register
  Word word[kPacks][sizeof(Pack<T, kSize>) / sizeof(Word)];

  __device__ Pack<T, kSize> operator[](int p) const {
    Pack<T, kSize> pack;
    std::memcpy(&pack, word[p], sizeof pack);
    return pack;
  }
  __device__ void set(int p, const Pack<T, kSize>& pack) { std::memcpy(word[p], &pack, sizeof pack); }

  __device__ void load_from(const T* at, int whole = kPacks) {
    at = opaque(at);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (p < whole) set(p, load<kSize>(at + p * kApart));
    }
  }
  __device__ void store_to(T* at, uint32_t which) const {
    at = opaque(at);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (which >> p & 1) store<kSize>(at + p * kApart, (*this)[p]);
    }
  }
};

// The same elements in the memory of several ranks.
template <class T>
struct Places {
  char* const* base;  // [count]
  int64_t offset;     // bytes
  int count;
  DType dtype;

  __device__ T* of(int nth) const { return reinterpret_cast<T*>(base[nth] + offset); }
};

// Bit by bit.
template <class T>
__device__ void copy(const T* from, T* to, int n, bool aligned) {
  constexpr int kSize = 16 / sizeof(T), kPacks = 8;
  const auto batch = [&](int first, int whole) {
    const uint32_t done = (1u << whole) - 1;
    Packs<T, kSize, kPacks> x;
    x.load_from(from + first, whole);
    x.store_to(to + first, done);
    return done;
  };
  for_each_batch<kSize, kPacks>(n, aligned, batch, [&](int i) { to[i] = from[i]; });
}

// The sum of an element of all ranks, as csrc/math/collective.h has it.
template <class In>
__device__ auto sum_of(const Places<In>& from, int i, double factor) {
  using Sum = decltype(decode(In(), from.dtype));
  Sum value[kMaxPeers];
#pragma unroll
  for (int r = 0; r < kMaxPeers; ++r) {
    const In x = from.of(min(r, from.count - 1))[i];
    value[r] = r < from.count ? decode(x, from.dtype) : kNothing<Sum>;
  }
  if constexpr (std::is_same_v<Sum, float>) {
    return reduced([&](int rank) { return value[rank]; }, kMaxPeers, static_cast<float>(factor));
  } else {
    Sum total = value[0];
#pragma unroll
    for (int r = 1; r < kMaxPeers; ++r) total += value[r];
    return scaled(total, factor);
  }
}

// The same for a chunk, to all of `to`. A thread reads what all ranks have of an element before it writes it anywhere:
// a target may be a source.
template <class In, class Out>
__device__ void reduce(const Places<In>& from, const Places<Out>& to, double factor, int n, bool aligned) {
  using Sum = decltype(decode(In(), from.dtype));
  constexpr int kSize = 16 / (sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out)), kPacks = 4;
  const auto batch = [&](int first, int whole) {
    Sum total[kPacks][kSize];
    Packs<In, kSize, kPacks> x, next;
    Packs<Out, kSize, kPacks> out;
#pragma unroll
    for (auto& pack : total) {
#pragma unroll
      for (Sum& sum : pack) sum = kNothing<Sum>;
    }
    next.load_from(from.of(0) + first, whole);
#pragma unroll 1
    for (int r = 0; r < from.count; ++r) {
      x = next;
      if (r + 1 < from.count) next.load_from(from.of(r + 1) + first, whole);
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) total[p][j] += decode(x[p][j], from.dtype);
      }
    }
    uint32_t done = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      bool good = p < whole;
      Pack<Out, kSize> pack;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const Sum sum = scaled(total[p][j], factor);
        if constexpr (std::is_same_v<Sum, float>) good &= is_finite(sum);
        pack[j] = stored<Out>(sum, to.dtype);
      }
      out.set(p, pack);
      done |= static_cast<uint32_t>(good) << p;
    }
#pragma unroll 1
    for (int nth = 0; nth < to.count; ++nth) out.store_to(to.of(nth) + first, done);
    return done;
  };
  for_each_batch<kSize, kPacks>(n, aligned, batch, [&](int i) {
    const Out sum = stored<Out>(sum_of(from, i, factor), to.dtype);
#pragma unroll 1
    for (int nth = 0; nth < to.count; ++nth) to.of(nth)[i] = sum;
  });
}

// tell(block, the sum of its squares), of what this thread block has stored.
template <class Out, class Tell>
__device__ void measure(const Out* stored, DType dtype, int n, bool aligned, const Tell& tell) {
  constexpr int kSize = 16 / sizeof(Out), kRows = 8;
  const Group<kSize> group;
#pragma unroll 1
  for (int begin = group.index * kReadBlock; begin < n; begin += group.kGroups * kReadBlock) {
    const int end = min(begin + static_cast<int>(kReadBlock), n), first = begin + group.member * kSize;
    const auto by_row = [&](const auto& add) {
#pragma unroll 1
      for (int i = first; i < end; i += kLanes) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) add(j, i + j < end ? decode(stored[i + j], dtype) : 0.0f);
      }
    };
    Lane lanes[kSize] = {};
    if (aligned && end - begin == kReadBlock) {
#pragma unroll 1
      for (int i = first; i < end; i += kRows * kLanes) {
        Packs<Out, kSize, kRows, kLanes> x;
        x.load_from(stored + i);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
#pragma unroll
          for (int j = 0; j < kSize; ++j) lanes[j].add(decode(x[row][j], dtype));
        }
      }
    } else {
      by_row([&](int j, float x) { lanes[j].add(x); });
    }
    const double sum =
        group.total(lanes, [&](double (&sums)[kSize]) { by_row([&](int j, double x) { sums[j] += x * x; }); });
    if (group.member == 0) tell(begin / kReadBlock, sum);
  }
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
  const DType in = static_cast<DType>(call.in), out = static_cast<DType>(call.out);
  const auto is_aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  const bool aligned = is_aligned(call.input) && is_aligned(call.output);
  constexpr bool kSame = std::is_same_v<In, Out>;
  const bool one_shot = call.kind == Call::kAllReduce && call.place < 0;
  const bool two_shot = call.kind == Call::kAllReduce && !one_shot;
  const Portion mine = share_of(two_shot ? portion_of(call.numel, rank, ranks) : Portion{0, call.numel});
  const auto for_each_chunk = [&](const auto& body) {
#pragma unroll 1
    for (int64_t at = mine.begin; at < mine.end; at += kChunk) {
      body(at, static_cast<int>(min(mine.end - at, int64_t{kChunk})));
    }
  };

  if (__syncthreads_or(meetings.own.broken)) return false;  // another thread block may be setting it
  if constexpr (kSame) {
    const In* input = static_cast<const In*>(call.input);
    In* shown = reinterpret_cast<In*>(meetings.stage(rank));
    if (one_shot) for_each_chunk([&](int64_t at, int n) { copy(input + at, shown + at, n, aligned); });
  }
  if (!meetings.begin()) return false;
  if (call.kind == Call::kAllGather) {
#pragma unroll 1
    for (int r = 0; r < ranks; ++r) {
      const int64_t to_at = r * call.numel * int64_t{sizeof(Out)};
      const bool together = aligned && to_at % 16 == 0;
      for_each_chunk([&](int64_t at, int n) {
        const Places<In> from = {call.data + r, at * int64_t{sizeof(In)}, 1, in};
        const Places<Out> to = {&call.output, to_at + at * int64_t{sizeof(Out)}, 1, out};
        if constexpr (kSame) {
          if (!std::is_same_v<Out, Half> || in == out) return copy(from.of(0), to.of(0), n, together);
        }
        reduce(from, to, 1.0, n, together);
      });
    }
  } else {
    const int64_t part = call.kind == Call::kReduceScatter ? rank * call.numel : 0;
    const int64_t from_at = one_shot ? meetings.stage(0) - call.shared[0] : part * int64_t{sizeof(In)};
    const bool together = aligned && from_at % 16 == 0;
    for_each_chunk([&](int64_t at, int n) {
      const Places<In> from = {one_shot ? call.shared : call.data, from_at + at * int64_t{sizeof(In)}, ranks, in};
      const Places<Out> to = {two_shot ? call.data : &call.output, at * int64_t{sizeof(Out)}, two_shot ? ranks : 1,
                              out};
      reduce(from, to, call.factor, n, together);
      if constexpr (kIsFloat<Out>) {
        if (!call.measured()) return;
        __syncthreads();
        measure(to.of(two_shot ? rank : 0), out, n, aligned, [&](int block, double sum) {
#pragma unroll 1
          for (int r = 0; r < ranks; ++r) {
            if (two_shot || r == rank) meetings.sums(r)[at / kReadBlock + block] = sum;
          }
        });
      }
    });
  }
  return one_shot || meetings.meet();  // until then nobody may touch what another reads or writes
}

struct Calls {
  Call call[kMostTogether];
};

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, kResident) collective_kernel(const __grid_constant__ Calls calls) {
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
  const int64_t portion =
      call.kind == Call::kAllReduce && call.place >= 0 ? (call.numel + call.ranks - 1) / call.ranks : call.numel;
  const int64_t blocks = (portion + kReadBlock - 1) / kReadBlock;
  const int grid = static_cast<int>(std::clamp<int64_t>(blocks, 1, std::min(meetings, kMeetings)));
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
