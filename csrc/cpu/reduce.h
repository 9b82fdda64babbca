// Sums of squares of one block, and of many blocks' sums (the order: csrc/math/squares.h).
#pragma once

#include <algorithm>
#include <vector>

#include "../math/squares.h"
#include "strips.h"

namespace deepfast::cpu {

static_assert(kStrip == kLanes);

inline double pairwise(double* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// x, elements i .. i + V's width of a block, added to the block's sum[kLanes]. NaN is not the largest: it shows in the
// sums.
template <class V>
DF_INLINE void add_squares(V x, int64_t i, float* sum, Pack& largest) {
  float* lane = sum + i % kLanes;
  store(fma(x, x, load(lane, V())), lane);
  largest = larger(Pack(magnitude(x)), largest);
}

// The block's sum, not finite where an element is not. x(i): the floats that were added before, n of them.
template <class Again>
DF_INLINE double total(const float* sum, Pack largest, int64_t n, const Again& x) {
  double lanes[kLanes];
  std::copy(sum, sum + kLanes, lanes);
  float magnitudes[kWidth<Pack>];
  store(largest, magnitudes);
  if (needs_fp64(to_bits(*std::max_element(magnitudes, std::end(magnitudes))))) {
    std::fill(lanes, lanes + kLanes, 0.0);
    for (int64_t i = 0; i < n; ++i) lanes[i % kLanes] += static_cast<double>(x(i)) * x(i);
  }
  return pairwise(lanes);
}

template <DType kType>
double sum_of_squares(const void* src, int64_t offset, int64_t n) {
  constexpr int kPacks = kLanes / kWidth<Pack>;
  constexpr int kChains = kWidth<Pack> == 1 ? kPacks : kPacks / 2;  // of maxima: each waits for the one before
  Pack sums[kPacks], largest[kChains];
  std::fill(sums, sums + kPacks, 0.0f);
  std::fill(largest, largest + kChains, 0.0f);
  const int64_t ahead = ahead_of(1);
  int64_t i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    ask_ahead(src, kType, offset + i, ahead);
#pragma GCC unroll 8
    for (int k = 0; k < kPacks; ++k) {
      const Pack x = load<Pack>(src, kType, offset + i + k * kWidth<Pack>);
      sums[k] = fma(x, x, sums[k]);
      largest[k % kChains] = larger(magnitude(x), largest[k % kChains]);
    }
  }
  alignas(64) float sum[kLanes];
  for (int k = 0; k < kPacks; ++k) store(sums[k], sum + k * kWidth<Pack>);
  for (int k = 1; k < kChains; ++k) largest[0] = larger(largest[k], largest[0]);
  for (; i < n; ++i) add_squares(load<float>(src, kType, offset + i), i, sum, largest[0]);
  return total(sum, largest[0], n, [&](int64_t i) { return load<float>(src, kType, offset + i); });
}

// src[offset .. offset + n] -> its sum of squares, not finite where an element is not.
inline double sum_of_squares(const void* src, DType dtype, int64_t offset, int64_t n) {
  switch (dtype) {
    case DType::kFloat16:
      return sum_of_squares<DType::kFloat16>(src, offset, n);
    case DType::kBFloat16:
      return sum_of_squares<DType::kBFloat16>(src, offset, n);
    default:
      return sum_of_squares<DType::kFloat32>(src, offset, n);
  }
}

// The sum over partial[n]; Total knows how to add a block's sum, and another total.
template <class Total, class Partial>
Total fold(const Partial* partial, int64_t n) {
  if (n > kFoldLanes) {
    std::vector<Total> rows;
    for (int64_t i = 0; i < n; i += kFoldLanes) {
      rows.push_back(fold<Total>(partial + i, std::min<int64_t>(kFoldLanes, n - i)));
    }
    return fold<Total>(rows.data(), static_cast<int64_t>(rows.size()));
  }
  Total lanes[kFoldLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i].add(partial[i]);
  for (int half = kFoldLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane].add(lanes[lane + half]);
  }
  return lanes[0];
}

}  // namespace deepfast::cpu
