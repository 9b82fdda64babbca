// Micro-batches summed in fp32, also where their gradients are 16 bits wide.
#include "pack.cuh"

namespace deepfast::cuda {
namespace {

template <class Grad>
__device__ void add(const Span& span, int64_t begin, int64_t end, float weight, bool overwrite) {
  constexpr int kPack = 4;
  const DType dtype = span.grad_dtype;
  float* sum = static_cast<float*>(span.param);
  const Grad* grad = static_cast<const Grad*>(span.grad);
  const int common = phase<kPack>(sum);
  for_each<kPack>(begin, end, phase<kPack>(grad) == common ? common : -1, [&](int64_t i, auto size) {
    const auto g = load<size.value>(grad + i);
    Pack<float, size.value> total = {};
    if (!overwrite) total = load<size.value>(sum + i);
#pragma unroll
    for (int j = 0; j < size.value; ++j) {
      const float x = decode(g[j], dtype);
      total[j] = overwrite ? weight * x : fma(weight, x, total[j]);
    }
    store<size.value>(sum + i, total);
  });
}

__global__ void __launch_bounds__(kThreads, kResident)
    accumulate_kernel(const __grid_constant__ Packed packed, float weight, bool overwrite) {
  const Table table(packed);
  for (Share share(table); share.more(); share.next()) {
    const Span& span = table.spans[share.span];
    const int64_t begin = share.first() * kStepBlock, end = min(share.last() * kStepBlock, span.numel);
    if (span.grad_dtype == DType::kFloat32) {
      add<float>(span, begin, end, weight, overwrite);
    } else {
      add<Half>(span, begin, end, weight, overwrite);
    }
  }
}

}  // namespace

Needs accumulate_needs(const Job& job) { return {0, 0, table_bytes(job)}; }

void accumulate(const Job& job, const Workspace& workspace, float weight, bool overwrite, Stream stream) {
  Packed packed;
  pack(packed, job, kStepBlock, workspace, stream);
  launch(accumulate_kernel, elementwise_grid(packed.blocks), kThreads, stream, packed, weight, overwrite);
}

}  // namespace deepfast::cuda
