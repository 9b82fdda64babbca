// The loss scaler's transition, once per update. The table stands in deepfast.LossScaler's docstring.
// Dynamic loss scaling: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; hysteresis as in Megatron-LM.
#pragma once

#include "numeric.h"

namespace deepfast {

// Lies in a tensor of four fp32 values (counts are exact up to 2^24).
struct ScalerState {
  float scale;
  float growth_tracker;   // clean steps since the scale last changed or overflowed
  float hysteresis_left;  // overflows still forgiven before the scale backs off
  float skipped_steps;    // all overflows so far
};

struct ScalerOptions {
  double growth_factor, backoff_factor;
  int64_t growth_interval, hysteresis;
  bool consecutive_hysteresis, dynamic;
  double min_scale, max_scale;
};

DF_INLINE ScalerState transition(ScalerState s, bool overflow, const ScalerOptions& o) {
  if (overflow) s.skipped_steps += 1.0f;
  if (!o.dynamic) return s;
  if (overflow) {
    s.growth_tracker = 0.0f;
    if (s.hysteresis_left > 0.0f) s.hysteresis_left -= 1.0f;
    if (s.hysteresis_left == 0.0f) {
      const double backed_off = s.scale * o.backoff_factor;
      const double floor = s.scale < o.min_scale ? s.scale : o.min_scale;  // an overflow never raises the scale
      s.scale = static_cast<float>(backed_off > floor ? backed_off : floor);
    }
    return s;
  }
  if (o.consecutive_hysteresis) s.hysteresis_left = static_cast<float>(o.hysteresis);
  s.growth_tracker += 1.0f;
  if (s.growth_tracker >= static_cast<float>(o.growth_interval)) {
    const double grown = s.scale * o.growth_factor;
    s.scale = static_cast<float>(grown < o.max_scale ? grown : o.max_scale);
    s.growth_tracker = 0.0f;
    s.hysteresis_left = static_cast<float>(o.hysteresis);
  }
  return s;
}

}  // namespace deepfast
