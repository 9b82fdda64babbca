// Micro-batches summed in fp32, also where their gradients are 16 bits wide.
#include "blocks.h"
#include "kernels.h"
#include "strips.h"

namespace deepfast::cpu {

void accumulate(const Span* spans, int64_t count, float weight, bool overwrite) {
  const Blocks blocks(spans, count);
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t) {
    const void* grad = spans[s].grad;
    const DType dtype = spans[s].grad_dtype;
    float* sum = static_cast<float*>(spans[s].param);
    const int64_t distance = ahead_of(2);
    const auto ahead = [&](int64_t i) {
      ask_ahead(grad, dtype, offset + i, distance);
      if (!overwrite) ask_ahead(sum, DType::kFloat32, offset + i, distance);
    };
    for_each(n, ahead, [&](int64_t k, auto v) {
      using V = decltype(v);
      const int64_t i = offset + k;
      const V g = load<V>(grad, dtype, i);
      store(overwrite ? weight * g : fma(weight, g, load(sum + i, v)), sum + i);
    });
  });
}

}  // namespace deepfast::cpu
