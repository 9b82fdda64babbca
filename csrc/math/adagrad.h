// Adagrad, one element at a time. Duchi, Hazan & Singer 2011, JMLR 12, diagonal form; torch's learning-rate decay.
#pragma once

#include "numeric.h"

namespace deepfast {

struct Adagrad {
  static constexpr int kMoments = 1;  // sum
  static constexpr int kHyper = 4;    // lr, lr_decay, weight_decay, eps
  static constexpr bool kCountsSteps = true, kNeedsNorms = false;

  float step_size;  // lr / (1 + (t - 1) * lr_decay)
  float penalty, eps;

  static DF_INLINE Adagrad prepare(const double* hyper, int64_t t) {
    return {
        static_cast<float>(hyper[0] / (1.0 + static_cast<double>(t - 1) * hyper[1])),
        static_cast<float>(hyper[2]),
        static_cast<float>(hyper[3]),
    };
  }

  template <class V>
  DF_INLINE V update(V p, V g, V& sum) const {
    g = penalized(g, penalty, p);
    sum = fma(g, g, sum);
    return fma(-step_size, g / (sqrt(sum) + eps), p);
  }
};

}  // namespace deepfast
