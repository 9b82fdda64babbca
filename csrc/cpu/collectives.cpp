#include "collectives.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "reduce.h"

namespace deepfast::cpu {

namespace {

constexpr int64_t kPiece = 512 << 10;    // bytes: what is staged stays in the cache
constexpr int64_t kSerial = 256 * 1024;  // bytes: less is not worth waking a thread for
static_assert(kPiece <= Peers::kStage && Peers::kStage / kMaxRanks / 8 >= kReadBlock);

int64_t size_of(Element type) {
  switch (type) {
    case Element::kFloat16:
    case Element::kBFloat16:
      return 2;
    case Element::kFloat64:
    case Element::kInt64:
      return 8;
    default:
      return 4;
  }
}

bool is_float(Element type) { return type <= Element::kBFloat16; }

// The same elements of all ranks, and where their sum goes.
struct Streams {
  const char* from[kMaxRanks];
  char* to[kMaxRanks];
  int sources, targets;

  Streams(int sources, int targets) : sources(sources), targets(targets) {}
};

// What left fp32's range, summed again.
template <class V>
V repaired(V sum, const Streams& s, DType in, int64_t i, float factor) {
  float each[kWidth<V>];
  store(sum, each);
  for (int lane = 0; lane < kWidth<V>; ++lane) {
    const auto load_from = [&](int r) { return load<float>(s.from[r], in, i + lane); };
    if (!is_finite(each[lane])) each[lane] = reduced(load_from, s.sources, factor);
  }
  return load(each, V());
}

template <DType kType>
using Known = std::integral_constant<DType, kType>;

// kCount V's, from element i on. In, Out: DType, or one that is Known when this is compiled.
template <class V, int kCount, class In, class Out>
DF_INLINE void reduce_some(const Streams& s, int64_t i, float factor, In in, Out out) {
  constexpr int kSize = kWidth<V>;
  V sum[kCount];
  bool ordinary = true;
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) sum[k] = load<V>(s.from[0], in, i + k * kSize);
  for (int r = 1; r < s.sources; ++r) {
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) sum[k] = sum[k] + load<V>(s.from[r], in, i + k * kSize);
  }
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) {
    sum[k] = sum[k] * factor;
    ordinary &= finite(sum[k]);
  }
  if (!ordinary) {
    for (int k = 0; k < kCount; ++k) sum[k] = repaired(sum[k], s, in, i + k * kSize, factor);
  }
  if (out == DType::kFloat32) {
    for (int t = 0; t < s.targets; ++t) {
#pragma GCC unroll 8
      for (int k = 0; k < kCount; ++k) store(sum[k], reinterpret_cast<float*>(s.to[t]) + i + k * kSize);
    }
    return;
  }
  decltype(nearest_even(V(), DType())) rounded[kCount];
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) rounded[k] = ordinary ? nearest_even_number(sum[k], out) : nearest_even(sum[k], out);
  for (int t = 0; t < s.targets; ++t) {
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) store(rounded[k], reinterpret_cast<uint16_t*>(s.to[t]) + i + k * kSize);
  }
}

// elements [begin, begin + n)
template <class In, class Out>
void reduce_floats(const Streams& s, int64_t begin, int64_t n, float factor, In in, Out out) {
  int64_t i = begin;
  const int64_t end = begin + n, ahead = ahead_of(s.sources);
  for (; i + kStrip <= end; i += kStrip) {
    for (int r = 0; r < s.sources; ++r) ask_ahead(s.from[r], in, i, ahead);
    reduce_some<Pack, kStrip / kWidth<Pack>>(s, i, factor, in, out);
  }
  for (; i + kWidth<Pack> <= end; i += kWidth<Pack>) reduce_some<Pack, 1>(s, i, factor, in, out);
  for (; i < end; ++i) reduce_some<float, 1>(s, i, factor, in, out);
}

void reduce_floats(const Streams& s, int64_t begin, int64_t n, const Reduction& how) {
  const float factor = static_cast<float>(how.factor);
  const auto reduce = [&](auto in, auto out) { reduce_floats(s, begin, n, factor, in, out); };
  if (how.in != how.out) {
    reduce(static_cast<DType>(how.in), static_cast<DType>(how.out));
  } else if (how.in == Element::kFloat16) {
    reduce(Known<DType::kFloat16>(), Known<DType::kFloat16>());
  } else if (how.in == Element::kBFloat16) {
    reduce(Known<DType::kBFloat16>(), Known<DType::kBFloat16>());
  } else {
    reduce(Known<DType::kFloat32>(), Known<DType::kFloat32>());
  }
}

template <class T>
void reduce_others(const Streams& s, int64_t at, int64_t n, double factor) {
  // Integers wrap around, as torch's do.
  using Sum = std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, std::type_identity<T>>::type;
  for (int64_t i = at; i < at + n; ++i) {
    Sum sum = reinterpret_cast<const T*>(s.from[0])[i];
    for (int r = 1; r < s.sources; ++r) sum += reinterpret_cast<const T*>(s.from[r])[i];
    if constexpr (!std::is_integral_v<T>) sum *= factor;
    for (int t = 0; t < s.targets; ++t) reinterpret_cast<T*>(s.to[t])[i] = static_cast<T>(sum);
  }
}

// elements [begin, end) of one block of the statistics; sum: of their squares, or null
void reduce_block(const Streams& s, int64_t begin, int64_t end, const Reduction& how, double* sum) {
  const int64_t n = end - begin;
  switch (how.in) {
    case Element::kFloat64:
      reduce_others<double>(s, begin, n, how.factor);
      break;
    case Element::kInt32:
      reduce_others<int32_t>(s, begin, n, how.factor);
      break;
    case Element::kInt64:
      reduce_others<int64_t>(s, begin, n, how.factor);
      break;
    default:
      reduce_floats(s, begin, n, how);
  }
  if (sum) *sum = sum_of_squares(s.to[0], static_cast<DType>(how.out), begin, end - begin);
}

// elements [begin, end), begin a multiple of kReadBlock; sums[block]: of squares, where they are wanted.
void reduce(const Streams& s, int64_t begin, int64_t end, const Reduction& how, double* sums) {
  const int64_t first = begin / kReadBlock, last = (end + kReadBlock - 1) / kReadBlock;
  const auto run = [&](int64_t block) {
    const int64_t at = block * kReadBlock;
    reduce_block(s, at, std::min(at + kReadBlock, end), how, sums ? sums + block : nullptr);
  };
  if ((end - begin) * size_of(how.in) < kSerial) {
    for (int64_t block = first; block < last; ++block) run(block);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t block = first; block < last; ++block) run(block);
}

// Floats to floats of another width, or bytes to bytes.
void convert(const char* from, Element in, char* to, Element out, int64_t n) {
  if (in == out) {
    std::memcpy(to, from, n * size_of(in));
    return;
  }
  const auto ahead = [&](int64_t i) { ask_ahead(from, static_cast<DType>(in), i, ahead_of(1)); };
  for_each(n, ahead, [&](int64_t i, auto v) {
    store(load<decltype(v)>(from, static_cast<DType>(in), i), to, static_cast<DType>(out), i);
  });
}

int64_t blocks_of(int64_t numel) { return (numel + kReadBlock - 1) / kReadBlock; }

// Pieces take the two slots in turn, the last one that of the operation: the next operation may write to the other at
// once, whatever is still being read.
int first_slot(int slot, int64_t numel, int64_t piece) { return slot ^ ((numel + piece - 1) / piece + 1) % 2; }

void check_sums(const Reduction& how, int64_t numel) {
  if (how.statistics && (!is_float(how.out) || blocks_of(numel) > Peers::kSums)) {
    throw std::runtime_error("deepfast: statistics are of fp32, fp16 and bf16, and of at most 2^35 elements");
  }
}

}  // namespace

void all_reduce(Peers& peers, void* data, int64_t numel, const Reduction& how) {
  check_sums(how, numel);
  const int rank = peers.rank(), ranks = peers.ranks();
  const int64_t size = size_of(how.in);
  char* own = static_cast<char*>(data);
  int slot = peers.begin({Announcement::kAllReduce, how.in, how.out, numel, how.factor, how.statistics != nullptr,
                          peers.heap_offset(data)});

  if (numel * size <= kOneShot) {
    std::memcpy(peers.stage(rank, slot), own, numel * size);
    peers.meet();
    peers.check_agreement();
    Streams s(ranks, 1);
    for (int r = 0; r < ranks; ++r) s.from[r] = peers.stage(r, slot);
    s.to[0] = own;
    double sums[kOneShot / 2 / kReadBlock + 1];
    reduce(s, 0, numel, how, how.statistics ? sums : nullptr);
    if (how.statistics) *how.statistics = fold<Statistics>(sums, blocks_of(numel));
    return;
  }

  double* sums = how.statistics ? peers.sums() : nullptr;
  peers.meet();
  peers.check_agreement();
  if (peers.all_in_heap()) {
    Streams s(ranks, ranks);
    for (int r = 0; r < ranks; ++r) s.from[r] = s.to[r] = peers.heap(r) + peers.said(r).offset;
    const Portion mine = portion_of(numel, rank, ranks);
    reduce(s, mine.begin, mine.end, how, sums);
    peers.meet();
  } else {
    const int64_t piece = kPiece / size / kReadBlock * kReadBlock;
    slot = first_slot(slot, numel, piece);
    for (int64_t begin = 0; begin < numel; begin += piece, slot ^= 1) {
      // What a peer is to reduce is shown to it; where its own portion would lie, a rank shows its result. Whoever
      // still reads a slot has not come to the first meeting of the next piece.
      const int64_t n = std::min(piece, numel - begin);
      char* shown = peers.stage(rank, slot);
      char* at = own + begin * size;
      for (int r = 0; r < ranks; ++r) {
        const Portion p = portion_of(n, r, ranks);
        if (r != rank) std::memcpy(shown + p.begin * size, at + p.begin * size, (p.end - p.begin) * size);
      }
      peers.meet();
      Streams s(ranks, 2);
      for (int r = 0; r < ranks; ++r) s.from[r] = r == rank ? at : peers.stage(r, slot);
      s.to[0] = at;
      s.to[1] = shown;
      const Portion mine = portion_of(n, rank, ranks);
      reduce(s, mine.begin, mine.end, how, sums ? sums + begin / kReadBlock : nullptr);
      peers.meet();
      for (int r = 0; r < ranks; ++r) {
        const Portion p = portion_of(n, r, ranks);
        if (r != rank)
          std::memcpy(at + p.begin * size, peers.stage(r, slot) + p.begin * size, (p.end - p.begin) * size);
      }
    }
  }
  if (how.statistics) *how.statistics = fold<Statistics>(sums, blocks_of(numel));
}

void reduce_scatter(Peers& peers, const void* in, void* out, int64_t numel, const Reduction& how) {
  check_sums(how, numel);
  const int rank = peers.rank(), ranks = peers.ranks();
  const int64_t size = size_of(how.in), out_size = size_of(how.out);
  const char* own = static_cast<const char*>(in);
  int slot = peers.begin({Announcement::kReduceScatter, how.in, how.out, numel, how.factor, how.statistics != nullptr,
                          peers.heap_offset(in)});
  std::vector<double> sums(how.statistics ? blocks_of(numel) : 0);
  Streams s(ranks, 1);

  peers.meet();
  peers.check_agreement();
  if (peers.all_in_heap()) {
    for (int r = 0; r < ranks; ++r) s.from[r] = peers.heap(r) + peers.said(r).offset + rank * numel * size;
    s.to[0] = static_cast<char*>(out);
    reduce(s, 0, numel, how, sums.empty() ? nullptr : sums.data());
    peers.meet();  // until then, nobody may write to its input
  } else {
    const int64_t piece = Peers::kStage / ranks / size / kReadBlock * kReadBlock;
    slot = first_slot(slot, numel, piece);
    for (int64_t begin = 0; begin < numel; begin += piece, slot ^= 1) {
      const int64_t n = std::min(piece, numel - begin);
      for (int r = 0; r < ranks; ++r) {
        std::memcpy(peers.stage(rank, slot) + r * piece * size, own + (r * numel + begin) * size, n * size);
      }
      peers.meet();
      for (int r = 0; r < ranks; ++r) s.from[r] = peers.stage(r, slot) + rank * piece * size;
      s.to[0] = static_cast<char*>(out) + begin * out_size;
      reduce(s, 0, n, how, sums.empty() ? nullptr : sums.data() + begin / kReadBlock);
    }
  }
  if (how.statistics) *how.statistics = fold<Statistics>(sums.data(), sums.size());
}

void all_gather(Peers& peers, const void* in, void* out, int64_t numel, Element in_type, Element out_type) {
  const int rank = peers.rank(), ranks = peers.ranks();
  const int64_t size = size_of(in_type), out_size = size_of(out_type);
  const char* own = static_cast<const char*>(in);
  char* all = static_cast<char*>(out);
  int slot = peers.begin({Announcement::kAllGather, in_type, out_type, numel, 1.0, false, peers.heap_offset(in)});

  peers.meet();
  peers.check_agreement();
  if (peers.all_in_heap()) {
    for (int r = 0; r < ranks; ++r) {
      const char* from = peers.heap(r) + peers.said(r).offset;
      convert(from, in_type, all + r * numel * out_size, out_type, numel);
    }
    peers.meet();
  } else {
    const int64_t piece = Peers::kStage / size;
    slot = first_slot(slot, numel, piece);
    for (int64_t begin = 0; begin < numel; begin += piece, slot ^= 1) {
      const int64_t n = std::min(piece, numel - begin);
      std::memcpy(peers.stage(rank, slot), own + begin * size, n * size);
      peers.meet();
      for (int r = 0; r < ranks; ++r) {
        convert(peers.stage(r, slot), in_type, all + (r * numel + begin) * out_size, out_type, n);
      }
    }
  }
}

void broadcast(Peers& peers, void* data, int64_t bytes, int root) {
  int slot = peers.begin({Announcement::kBroadcast, Element::kInt32, Element::kInt32, bytes, 1.0, false, -1});
  peers.meet();
  peers.check_agreement();
  slot = first_slot(slot, bytes, Peers::kStage);
  for (int64_t begin = 0; begin < bytes; begin += Peers::kStage, slot ^= 1) {
    const int64_t n = std::min(Peers::kStage, bytes - begin);
    char* at = static_cast<char*>(data) + begin;
    if (peers.rank() == root) std::memcpy(peers.stage(root, slot), at, n);
    peers.meet();
    if (peers.rank() != root) std::memcpy(at, peers.stage(root, slot), n);
  }
}

}  // namespace deepfast::cpu
