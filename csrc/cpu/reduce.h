// Sums of squares of one block, and of many blocks' sums (the order: csrc/math/squares.h).
#pragma once

#include <algorithm>
#include <vector>

#include "../math/squares.h"
#include "convert.h"

namespace deepfast::cpu {

static_assert(kStrip == kLanes);

inline double pairwise(double* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// src[offset .. offset + n] -> its sum of squares, not finite where an element is not.
inline double sum_of_squares(const void* src, DType dtype, int64_t offset, int64_t n) {
  alignas(64) float staged[kStrip];  // decoded strip by strip: memory never waits for arithmetic
  float sum[kStrip] = {};
  uint32_t largest[kStrip] = {};
  const auto add = [&](int64_t l, float x) {
    Lane lane = {sum[l], largest[l]};
    lane.add(x);
    sum[l] = lane.sum;
    largest[l] = lane.largest;
  };
  int64_t i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    const float* x = decode(src, dtype, offset + i, kStrip, staged);
    if (x != staged) ask_ahead(x);
    for (int64_t lane = 0; lane < kStrip; ++lane) add(lane, x[lane]);
  }
  const float* rest = decode(src, dtype, offset + i, n - i, staged);
  for (int64_t lane = 0; i + lane < n; ++lane) add(lane, rest[lane]);

  double lanes[kStrip];
  for (int64_t lane = 0; lane < kStrip; ++lane) lanes[lane] = sum[lane];
  if (needs_fp64(*std::max_element(largest, largest + kStrip))) {
    std::fill(lanes, lanes + kStrip, 0.0);
    for (i = 0; i < n; i += kStrip) {
      const int64_t length = std::min(kStrip, n - i);
      const float* x = decode(src, dtype, offset + i, length, staged);
      for (int64_t lane = 0; lane < length; ++lane) lanes[lane] += static_cast<double>(x[lane]) * x[lane];
    }
  }
  return pairwise(lanes);
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
