// LAMB, one element at a time. You et al. 2020, arXiv:1904.00962, algorithm 2.
//
// The step of a parameter is as long as the parameter itself: a direction r, then p -= lr * phi(|p|) / |r| * r. The
// two norms are over the whole parameter, so there are two passes: `direct` moves the moments on and yields r, of which
// the loops form the norms; `update` finds r again from the moments (it costs less than writing it down).
#pragma once

#include "adam.h"
#include "squares.h"

namespace deepfast {

struct LAMB {
  static constexpr int kMoments = 2;  // exp_avg, exp_avg_sq
  static constexpr int kHyper = 7;    // lr, beta1, beta2, eps, weight_decay, bounds of phi (lower, upper)
  static constexpr bool kCountsSteps = true, kNeedsNorms = true;

  AdamMoments moments;
  float inv_bias1;       // 1 / (1 - beta1^t)
  float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
  float eps, weight_decay;
  double lr, lower, upper;
  float step_size;  // lr * trust ratio, known after `adapt`

  static DF_INLINE LAMB prepare(const double* hyper, int64_t t) {
    const double beta1 = hyper[1], beta2 = hyper[2];
    return {
        {static_cast<float>(1.0 - beta1), static_cast<float>(1.0 - beta2)},
        static_cast<float>(1.0 / (1.0 - power(beta1, t))),
        static_cast<float>(1.0 / std::sqrt(1.0 - power(beta2, t))),
        static_cast<float>(hyper[3]),
        static_cast<float>(hyper[4]),
        hyper[0],
        hyper[5],
        hyper[6],
        0.0f,
    };
  }

  // First pass. Returns the direction.
  template <class V>
  DF_INLINE V direct(V p, V g, V& m, V& v) const {
    moments.average(g, m, v);
    return direction(p, m, v);
  }

  // Between the passes. Where either norm is zero, the ratio is 1.
  DF_INLINE void adapt(const Norms& norms) {
    double ratio = 1.0;
    if (norms.param > 0.0 && norms.direction > 0.0) {
      const double length = std::sqrt(norms.param);
      const double phi = length < lower ? lower : length > upper ? upper : length;
      ratio = phi / std::sqrt(norms.direction);
    }
    step_size = static_cast<float>(lr * ratio);
  }

  // Second pass; the gradient is not needed any more.
  template <class V>
  DF_INLINE V update(V p, V, V& m, V& v) const {
    return fma(-step_size, direction(p, m, v), p);
  }

  template <class V>
  DF_INLINE V direction(V p, V m, V v) const {
    return penalized(m * inv_bias1 / fma(sqrt(v), inv_sqrt_bias2, eps), weight_decay, p);
  }
};

}  // namespace deepfast
