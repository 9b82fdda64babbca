// Adam and its variants, one element at a time.
//
//   Adam     Kingma & Ba 2015, arXiv:1412.6980, algorithm 1
//   AdamW    Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2 (decoupled weight decay)
//   AMSGrad  Reddi, Kale & Kumar 2018, arXiv:1904.09237, in torch's form (the maximum is taken before bias correction)
#pragma once

#include "numeric.h"

namespace deepfast {

// exp_avg and exp_avg_sq moved on by the gradient g; Adam and LAMB share them.
struct AdamMoments {
  float one_minus_beta1, one_minus_beta2;

  template <class V>
  DF_INLINE void average(V g, V& m, V& v) const {
    g = squarable(g);
    m = moving_average(m, one_minus_beta1, g);
    v = moving_average(v, one_minus_beta2, g, g);
  }
};

template <bool kAmsgrad>
struct Adam {
  static constexpr int kMoments = kAmsgrad ? 3 : 2;  // exp_avg, exp_avg_sq, max_exp_avg_sq
  // lr, beta1, beta2, eps, weight_decay (decoupled), penalty (not), bias_correction (0 or 1)
  static constexpr int kHyper = 7;
  static constexpr bool kCountsSteps = true, kNeedsNorms = false;

  float decay;    // lr * weight_decay
  float penalty;  //
  AdamMoments moments;
  float step_size;       // lr / (1 - beta1^t); without bias correction lr
  float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t); without 1
  float eps;             //

  // hyper: kHyper values; t: this parameter's step count, from 1.
  static DF_INLINE Adam prepare(const double* hyper, int64_t t) {
    const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], weight_decay = hyper[4];
    const bool corrects = hyper[6] != 0.0;
    const double bias1 = corrects ? 1.0 - power(beta1, t) : 1.0, bias2 = corrects ? 1.0 - power(beta2, t) : 1.0;
    return {
        static_cast<float>(lr * weight_decay),
        static_cast<float>(hyper[5]),
        {static_cast<float>(1.0 - beta1), static_cast<float>(1.0 - beta2)},
        static_cast<float>(lr / bias1),
        static_cast<float>(1.0 / std::sqrt(bias2)),
        static_cast<float>(eps),
    };
  }

  // p: parameter, g: gradient (unscaled and clipped); the moments are updated. Returns the new parameter.
  template <class V>
  DF_INLINE V update(V p, V g, V& m, V& v) const {
    moments.average(penalized(g, penalty, p), m, v);
    return descend(p, m, v);
  }

  template <class V>
  DF_INLINE V update(V p, V g, V& m, V& v, V& v_max) const {
    moments.average(penalized(g, penalty, p), m, v);
    v_max = select(v != v, v, larger(v, v_max));  // NaN is not lost
    return descend(p, m, v_max);
  }

 private:
  template <class V>
  DF_INLINE V descend(V p, V m, V v) const {
    return descended(p, step_size * (m / fma(sqrt(v), inv_sqrt_bias2, eps)), decay);
  }
};

}  // namespace deepfast
