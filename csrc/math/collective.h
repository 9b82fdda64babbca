// The sum over ranks: in rank order, in fp32, rounded once, and so the same bits on every rank and backend.
#pragma once

#include "squares.h"

namespace deepfast {

constexpr int kMaxRanks = 64;  // on one host

// What a collective moves. The first three as in span.h's DType.
enum class Element : uint8_t { kFloat32, kFloat16, kBFloat16, kFloat64, kInt32, kInt64 };

// The elements that one rank reduces for all: whole blocks of the statistics, so that these do not depend on the
// number of ranks.
struct Portion {
  int64_t begin, end;
};

DF_INLINE Portion portion_of(int64_t numel, int rank, int ranks) {
  const int64_t blocks = (numel + kReadBlock - 1) / kReadBlock;
  const int64_t begin = blocks * rank / ranks * kReadBlock, end = blocks * (rank + 1) / ranks * kReadBlock;
  return {begin < numel ? begin : numel, end < numel ? end : numel};
}

DF_INLINE bool is_finite(float x) { return (to_bits(x) & 0x7fffffffu) < 0x7f800000u; }

// load(rank): an element of each rank, as fp32. factor: scale, or scale / ranks for a mean. A sum that leaves fp32's
// range is taken again in fp64, before it is divided: a finite mean never becomes infinite.
template <class Load>
DF_INLINE float reduced(const Load& load, int ranks, float factor) {
  float sum = load(0);
  for (int rank = 1; rank < ranks; ++rank) sum += load(rank);
  const float result = sum * factor;
  if (is_finite(result)) return result;
  double wide = load(0);
  for (int rank = 1; rank < ranks; ++rank) wide += load(rank);
  return static_cast<float>(wide * factor);
}

}  // namespace deepfast
