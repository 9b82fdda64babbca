// Masters that take over what somebody else has written to their 16-bit weights.
#include "blocks.h"
#include "convert.h"
#include "kernels.h"

namespace deepfast::cpu {

void refresh(const Span* spans, int64_t count) {
  const Blocks blocks(spans, count);
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t) {
    const Span& span = spans[s];
    alignas(64) float weight[kBlock], rounded[kBlock];
    alignas(64) uint16_t encoded[kBlock] = {};
    float* __restrict master = span.master + offset;
    decode(span.param, span.param_dtype, offset, n, weight);
    encode(master, encoded, span.param_dtype, 0, n, true);
    decode(encoded, span.param_dtype, 0, n, rounded);
    for (int64_t i = 0; i < n; ++i) master[i] = rounded[i] == weight[i] ? master[i] : weight[i];
  });
}

}  // namespace deepfast::cpu
