// In which order squares are added: the same on every backend, so that a norm has the same bits everywhere.
//
// Elements are dealt out to kLanes sums, element i to lane i % kLanes, block after block; the lanes of a block are
// added pairwise in fp64 (lane + lane of the other half). So are the blocks' sums, a row of kFoldLanes at a time, then
// the rows' sums, and so on until there is one: rows can be added by many at once. Neither threads nor vector width nor
// the number of multiprocessors decide anything.
#pragma once

#include "numeric.h"

namespace deepfast {

constexpr int kLanes = 64;
constexpr int kFoldLanes = 256;
constexpr int kReadBlock = 4096;  // elements, where gradients are only read: each block costs a reduction
constexpr int kStepBlock = 1024;  // elements, where a step is made

// One of a block's sums, and the largest magnitude (as bits) it has seen.
struct Lane {
  float sum;
  uint32_t largest;

  DF_INLINE void add(float x) {
    sum = fma(x, x, sum);
    const uint32_t magnitude = to_bits(x) & 0x7fffffffu;
    largest = largest > magnitude ? largest : magnitude;
  }
};

// Whether fp32 lanes have overflowed or lost small values, so that the block has to be added again in fp64. (Where
// something is not finite, the sum is not, and that is what is wanted.)
DF_INLINE bool needs_fp64(uint32_t largest) {
  const float bound = from_bits(largest);
  return largest != 0 && largest < 0x7f800000u && (bound > 0x1p55f || bound < 0x1p-55f);
}

// Sums over gradients. A block's sum is not finite exactly where one of its elements is not.
struct Statistics {
  double sum_of_squares;  // of the gradients as they are, scale included
  double non_finite;      // > 0: some gradient is inf or NaN

  DF_INLINE void add(double block) {
    sum_of_squares += block;
    non_finite += block - block == 0.0 ? 0.0 : 1.0;
  }
  DF_INLINE void add(const Statistics& other) {
    sum_of_squares += other.sum_of_squares;
    non_finite += other.non_finite;
  }
};

// Sums of squares over one whole parameter.
struct Norms {
  double param, direction;

  DF_INLINE void add(const Norms& other) {
    param += other.param;
    direction += other.direction;
  }
};

}  // namespace deepfast
