// Masters that take over what somebody else has written to their 16-bit weights.
#include "pack.cuh"

namespace deepfast::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, kResident) refresh_kernel(const __grid_constant__ Packed packed) {
  constexpr int kPack = 4;
  const Table table(packed);
  for (Share share(table); share.more(); share.next()) {
    const Span& span = table.spans[share.span];
    const int64_t begin = share.first() * kStepBlock, end = min(share.last() * kStepBlock, span.numel);
    const Half* weights = static_cast<const Half*>(span.param);
    const DType dtype = span.param_dtype;
    const int common = phase<kPack>(span.master);
    for_each<kPack>(begin, end, phase<kPack>(weights) == common ? common : -1, [&](int64_t i, auto size) {
      const auto weight = load<size.value>(weights + i);
      auto master = load<size.value>(span.master + i);
#pragma unroll
      for (int j = 0; j < size.value; ++j) {
        const float now = decode(weight[j], dtype), then = decode(encode<true>(master[j], dtype), dtype);
        master[j] = then == now ? master[j] : now;
      }
      store<size.value>(span.master + i, master);
    });
  }
}

}  // namespace

Needs refresh_needs(const Job& job) { return {0, 0, table_bytes(job)}; }

void refresh(const Job& job, const Workspace& workspace, Stream stream) {
  Packed packed;
  pack(packed, job, kStepBlock, workspace, stream);
  launch(refresh_kernel, elementwise_grid(packed.blocks), kThreads, stream, packed);
}

}  // namespace deepfast::cuda
