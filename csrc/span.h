// The unit of work: a run of elements of one parameter with everything that a step touches for them.
//
// A list of spans goes to a kernel as one table, so that N tensors cost one launch. Loose parameters, flat buckets and
// shards differ only in how their table is made. All pointers of a span have the same element order; which order that
// is (contiguous, channels-last, transposed) is no concern of a kernel.
#pragma once

#include <cstdint>

#include "math/numeric.h"

namespace deepfast {

// kInt16: a split master. kInt8, kUInt8: moments in groups (codec/int8.h), signed and non-negative.
enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kInt16, kInt8, kUInt8 };

DF_INLINE bool is_grouped(DType dtype) { return dtype == DType::kInt8 || dtype == DType::kUInt8; }

constexpr int kMaxMoments = 3;

// What a step leaves of a gradient: what it was, zeros (skipped steps included), or what it was taken for, unscaled and
// clipped (as torch.amp.GradScaler's users expect).
enum class Afterwards : uint8_t { kKept, kReset, kWritten };

// How a weight without a master is rounded: to nearest, or up or down by chance (codec/noise.h).
enum class Rounding : uint8_t { kNearest, kStochastic };

struct Span {
  void* param;                // [numel] param_dtype
  void* grad;                 // [numel] grad_dtype
  void* master;               // [numel] master_dtype: of a parameter that is 16 bits wide its fp32 value, or
                              // (kInt16) what it lacks of that (codec/split.h); or null
  void* moment[kMaxMoments];  // [numel] moment_dtype each, as many as the rule keeps; grouped ones lie as
                              // codec/int8.h says
  float* step;                // [1] this parameter's step count, where the rule counts or chance is asked for
  int64_t numel;
  int64_t first;  // where in the whole parameter the first element is,
  uint64_t seed;  // and which random bits it has
  int32_t group;  // row of the hyperparameter table
  DType param_dtype, grad_dtype, master_dtype;
  DType moment_dtype[kMaxMoments];
  Rounding rounding;

  DF_INLINE bool has_split() const { return master && master_dtype == DType::kInt16; }
};

// Other ranks to whom new weights go, too: how many bytes after this rank's weight each has its own.
struct Sinks {
  const int64_t* displacement;  // on the host
  int64_t count;
};

}  // namespace deepfast
