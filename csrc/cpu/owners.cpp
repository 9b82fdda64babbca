#include "owners.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "reduce.h"

namespace deepfast::cpu {

namespace {

constexpr int64_t kShown = 512 << 10;  // bytes that a rank shows at a time: they stay in the cache
static_assert(kShown <= Peers::kStage && kMaxRanks * kReadBlock * sizeof(float) <= Peers::kStage);

// One block's gradients of all ranks, each with its weight, and where their sum is.
struct Sources {
  const char* from[kMaxRanks];
  float weight[kMaxRanks];
  int ranks;
  bool overwrite;
};

template <class In>
void add(const Sources& s, float* sum, int64_t n, In in) {
  const int64_t distance = ahead_of(1 + s.ranks);
  const auto ahead = [&](int64_t i) { ask_ahead(sum, DType::kFloat32, i, distance); };
  for_each(n, ahead, [&](int64_t i, auto v) {
    using V = decltype(v);
    const V first = load<V>(s.from[0], in, i);
    V x = s.overwrite ? V(s.weight[0]) * first : fma(s.weight[0], first, load(sum + i, v));
    for (int r = 1; r < s.ranks; ++r) x = fma(s.weight[r], load<V>(s.from[r], in, i), x);
    store(x, sum + i);
  });
}

void add(const Sources& s, Element in, float* sum, int64_t n) {
  switch (in) {
    case Element::kFloat16:
      return add(s, sum, n, std::integral_constant<DType, DType::kFloat16>());
    case Element::kBFloat16:
      return add(s, sum, n, std::integral_constant<DType, DType::kBFloat16>());
    default:
      return add(s, sum, n, std::integral_constant<DType, DType::kFloat32>());
  }
}

// Elements [begin, end) of the bucket -> to.
void show(const std::vector<Segment>& segments, int64_t begin, int64_t end, Element in, char* to) {
  const DType type = static_cast<DType>(in);
  const int64_t size = size_of(type);
  const auto after = [](int64_t at, const Segment& s) { return at < s.end; };
  auto s = std::upper_bound(segments.begin(), segments.end(), begin, after);
  for (int64_t at = begin; at < end;) {
    const bool gap = s == segments.end() || at < s->begin;
    const int64_t until = std::min(end, s == segments.end() ? end : gap ? s->begin : s->end);
    char* here = to + (at - begin) * size;
    if (gap) {
      std::memset(here, 0, (until - at) * size);
    } else if (s->dtype == type) {
      std::memcpy(here, static_cast<const char*>(s->data) + (at - s->begin) * size, (until - at) * size);
    } else {
      for_each(
          until - at, [](int64_t) {},
          [&](int64_t i, auto v) {
            store(load<decltype(v)>(s->data, s->dtype, at - s->begin + i), reinterpret_cast<float*>(here) + i);
          });
    }
    at = until;
    if (!gap && at == s->end) ++s;
  }
}

}  // namespace

void add_to_owners(Peers& peers, const std::vector<Segment>& segments, float* sum, const OwnedSum& how) {
  const int rank = peers.rank(), ranks = peers.ranks();
  const int64_t blocks = (how.numel + kReadBlock - 1) / kReadBlock;
  if (how.statistics && blocks > Peers::kSums) {
    throw std::runtime_error("deepfast: statistics are of at most 2^35 elements");
  }
  const DType type = static_cast<DType>(how.in);
  const int64_t size = size_of(type), mine = std::min(how.chunk * rank, how.numel);
  const int64_t offset = how.everywhere ? peers.heap_offset(sum - mine) : -1;
  if (how.everywhere && offset < 0) throw std::runtime_error("deepfast: sums for all ranks lie in no shared memory");
  Announcement announcement = {Announcement::kAddToOwners, how.in, Element::kFloat32, how.numel, 1.0,
                               how.statistics != nullptr,  offset};
  announcement.weight = how.weight;
  int slot = peers.begin(announcement);
  peers.meet();
  peers.check_agreement();

  // Piece by piece of all chunks at once: what a rank shows of the chunk of another, that one adds. Whoever still reads
  // a slot has not come to the first meeting of the next piece.
  const int64_t piece = std::max<int64_t>(kReadBlock, kShown / ranks / size / kReadBlock * kReadBlock);
  const int64_t pieces = (how.chunk + piece - 1) / piece;
  slot ^= (pieces + 1) % 2;
  for (int64_t begin = 0; begin < how.chunk; begin += piece, slot ^= 1) {
    char* shown = peers.stage(rank, slot);
#pragma omp parallel for schedule(static)
    for (int r = 0; r < ranks; ++r) {
      const int64_t from = r * how.chunk + begin, to = std::min({from + piece, (r + 1) * how.chunk, how.numel});
      if (from < to) show(segments, from, to, how.in, shown + r * piece * size);
    }
    peers.meet();
    const int64_t from = mine + begin, to = std::min({from + piece, mine + how.chunk, how.numel});
#pragma omp parallel for schedule(static)
    for (int64_t at = from; at < to; at += kReadBlock) {
      const int64_t n = std::min<int64_t>(kReadBlock, to - at);
      Sources s = {};
      s.ranks = ranks;
      s.overwrite = how.overwrite;
      for (int r = 0; r < ranks; ++r) {
        s.from[r] = peers.stage(r, slot) + (rank * piece + at - from) * size;
        s.weight[r] = peers.said(r).weight;
      }
      float* here = sum + (at - mine);
      add(s, how.in, here, n);
      if (how.statistics) peers.sums()[at / kReadBlock] = sum_of_squares<DType::kFloat32>(here, 0, n);
      for (int r = 0; how.everywhere && r < ranks; ++r) {
        char* whole = peers.heap(r) + peers.said(r).offset;
        if (r != rank) std::memcpy(whole + at * sizeof(float), here, n * sizeof(float));
      }
    }
  }
  if (how.statistics || how.everywhere) peers.meet();
  if (how.statistics) *how.statistics = fold<Statistics>(peers.sums(), blocks);
}

}  // namespace deepfast::cpu
