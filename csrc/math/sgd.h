// Stochastic gradient descent, one element at a time, in torch's form: momentum and Nesterov's as in Sutskever et al.
// 2013, "On the importance of initialization and momentum in deep learning", with the learning rate outside the buffer.
#pragma once

#include "numeric.h"

namespace deepfast {

template <bool kMomentum>
struct SGD {
  static constexpr int kMoments = kMomentum ? 1 : 0;  // momentum_buffer
  static constexpr int kHyper = 5;                    // lr, momentum, dampening, weight_decay, nesterov (0 or 1)
  static constexpr bool kCountsSteps = kMomentum, kNeedsNorms = false;

  float lr, momentum;
  float weight;  // of the gradient in the buffer: 1 - dampening, but 1 in the first step
  float penalty;
  bool nesterov;

  static DF_INLINE SGD prepare(const double* hyper, int64_t t) {
    return {
        static_cast<float>(hyper[0]),
        static_cast<float>(hyper[1]),
        t == 1 ? 1.0f : static_cast<float>(1.0 - hyper[2]),
        static_cast<float>(hyper[3]),
        hyper[4] != 0.0,
    };
  }

  template <class V>
  DF_INLINE V update(V p, V g) const {
    return fma(-lr, penalized(g, penalty, p), p);
  }

  template <class V>
  DF_INLINE V update(V p, V g, V& buffer) const {
    g = penalized(g, penalty, p);
    buffer = fma(momentum, buffer, weight * g);
    return fma(-lr, nesterov ? fma(momentum, buffer, g) : buffer, p);
  }
};

}  // namespace deepfast
