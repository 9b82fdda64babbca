// Sums of squares of one block. Added in fixed lanes, so that neither threads nor vector width decide the order.
#pragma once

#include <algorithm>

#include "../codec/half.h"
#include "strips.h"

namespace deepfast::cpu {

struct BlockSum {
  double sum_of_squares;
  bool non_finite;
};

// x[n] -> its sum of squares. The largest magnitude decides how the squares are added: in fp32 lanes where they neither
// overflow nor vanish, else in fp64.
inline BlockSum sum_of_squares(const float* x, int64_t n) {
  float sum[kStrip] = {};
  uint32_t largest[kStrip] = {};
  const auto add = [&](int64_t lane, float value) {
    sum[lane] = fma(value, value, sum[lane]);
    const uint32_t magnitude = to_bits(value) & ~kSign;
    largest[lane] = largest[lane] > magnitude ? largest[lane] : magnitude;
  };
  int64_t i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    ask_for(x + i + kAhead);
    for (int64_t lane = 0; lane < kStrip; ++lane) add(lane, x[i + lane]);
  }
  for (int64_t lane = 0; i + lane < n; ++lane) add(lane, x[i + lane]);

  double total = 0.0;
  uint32_t magnitude = 0;
  for (int64_t lane = 0; lane < kStrip; ++lane) {
    total += sum[lane];
    magnitude = std::max(magnitude, largest[lane]);
  }
  const bool non_finite = magnitude >= kInfinity;
  const float bound = from_bits(magnitude);
  if (!non_finite && magnitude != 0 && (bound > 0x1p55f || bound < 0x1p-55f)) {
    total = 0.0;
    for (int64_t j = 0; j < n; ++j) total += static_cast<double>(x[j]) * x[j];
  }
  return {total, non_finite};
}

}  // namespace deepfast::cpu
