// Micro-batches summed in fp32, also where their gradients are 16 bits wide.
#include "blocks.h"
#include "convert.h"
#include "kernels.h"

namespace deepfast::cpu {

void accumulate(const Span* spans, int64_t count, float weight, bool overwrite) {
  const Blocks blocks(spans, count);
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t) {
    alignas(64) float staged[kBlock];
    const float* __restrict g = decode(spans[s].grad, spans[s].grad_dtype, offset, n, staged);
    float* __restrict sum = static_cast<float*>(spans[s].param) + offset;
    if (overwrite) {
      for (int64_t i = 0; i < n; ++i) sum[i] = weight * g[i];
    } else {
      for (int64_t i = 0; i < n; ++i) sum[i] = fma(weight, g[i], sum[i]);
    }
  });
}

}  // namespace deepfast::cpu
