// Sums of squares of one block. Added in fixed lanes, so that neither threads nor vector width decide the order.
#pragma once

#include <algorithm>

#include "convert.h"

namespace deepfast::cpu {

struct BlockSum {
  double sum_of_squares;
  bool non_finite;
};

// src[offset .. offset + n] -> its sum of squares. The largest magnitude decides how the squares are added: in fp32
// lanes where they neither overflow nor vanish, else in fp64.
inline BlockSum sum_of_squares(const void* src, DType dtype, int64_t offset, int64_t n) {
  alignas(64) float staged[kStrip];  // decoded strip by strip: memory never waits for arithmetic
  float sum[kStrip] = {};
  uint32_t largest[kStrip] = {};
  const auto add = [&](int64_t lane, float x) {
    sum[lane] = fma(x, x, sum[lane]);
    const uint32_t magnitude = to_bits(x) & ~kSign;
    largest[lane] = largest[lane] > magnitude ? largest[lane] : magnitude;
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
  // Pairwise: a chain of 64 additions would take longer than all else.
  for (int64_t half = kStrip / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
      largest[lane] = std::max(largest[lane], largest[lane + half]);
    }
  }
  double total = lanes[0];
  const uint32_t magnitude = largest[0];
  const bool non_finite = magnitude >= kInfinity;
  const float bound = from_bits(magnitude);
  if (!non_finite && magnitude != 0 && (bound > 0x1p55f || bound < 0x1p-55f)) {
    total = 0.0;
    for (i = 0; i < n; i += kStrip) {
      const int64_t length = std::min(kStrip, n - i);
      const float* x = decode(src, dtype, offset + i, length, staged);
      for (int64_t j = 0; j < length; ++j) total += static_cast<double>(x[j]) * x[j];
    }
  }
  return {total, non_finite};
}

}  // namespace deepfast::cpu
