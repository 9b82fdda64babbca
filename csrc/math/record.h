// What one step decides before it writes anything, kept on the device so that the host never has to look.
#pragma once

#include "squares.h"

namespace deepfast {

// Lies in a tensor of three fp32 values.
struct StepRecord {
  float multiplier;  // what every gradient is multiplied by: clip coefficient / gradient scale
  float found_inf;   // > 0: this step writes nothing but the gradient reset
  float grad_norm;   // global L2 norm of the gradients, unscaled, before clipping

  DF_INLINE bool skipped() const { return found_inf > 0.0f; }
};

// grad_scale: what the gradients were multiplied by (loss scale, number of micro-batches). found_inf: 1 where somebody
// else has found a non-finite gradient. max_norm: clip to this global norm, 0 for none; the coefficient is that of
// torch.nn.utils.clip_grad_norm_. check: whether a non-finite gradient skips the step.
DF_INLINE StepRecord decide(const Statistics& statistics, float grad_scale, float found_inf, float max_norm,
                            bool check) {
  const double scale = grad_scale;
  const float norm = static_cast<float>(std::sqrt(statistics.sum_of_squares) / scale);
  double clip = 1.0;
  if (max_norm > 0.0f) {
    const double coefficient = max_norm / (static_cast<double>(norm) + 1e-6);
    clip = coefficient < 1.0 || coefficient != coefficient ? coefficient : 1.0;
  }
  const bool overflow = found_inf > 0.0f || (check && statistics.non_finite > 0.0);
  return {static_cast<float>(clip / scale), overflow ? 1.0f : 0.0f, norm};
}

}  // namespace deepfast
