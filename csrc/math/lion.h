// Lion, one element at a time. Chen et al. 2023, arXiv:2302.06675, algorithm 2.
#pragma once

#include "numeric.h"

namespace deepfast {

struct Lion {
  static constexpr int kMoments = 1;  // exp_avg
  static constexpr int kHyper = 4;    // lr, beta1, beta2, weight_decay
  static constexpr bool kCountsSteps = false, kNeedsNorms = false;

  float lr;
  float decay;  // lr * weight_decay
  float one_minus_beta1, one_minus_beta2;

  static DF_INLINE Lion prepare(const double* hyper, int64_t) {
    return {
        static_cast<float>(hyper[0]),
        static_cast<float>(hyper[0] * hyper[3]),
        static_cast<float>(1.0 - hyper[1]),
        static_cast<float>(1.0 - hyper[2]),
    };
  }

  template <class V>
  DF_INLINE V update(V p, V g, V& m) const {
    const V c = moving_average(m, one_minus_beta1, g);
    m = moving_average(m, one_minus_beta2, g);
    const V sign = select(c > V(0.0f), 1.0f, select(V(0.0f) > c, -1.0f, c));  // zero stays zero, NaN stays NaN
    return descended(p, lr * sign, decay);
  }
};

}  // namespace deepfast
