// Masters that take over what somebody else has written to their 16-bit weights.
#include "pack.cuh"

namespace deepfast::cuda {
namespace {

// A master's value beside a weight that may have been written to.
template <class H>
__device__ float seen(float master, Half weight) {
  const float written = H::decode(weight);
  return H::decode(H::from_master(master)) == written ? master : written;
}

// Elements [begin, end) of a span whose masters are of a type M: fp32, or what the weights lack.
template <class M>
__device__ void take_over(const Span& span, int64_t begin, int64_t end) {
  constexpr bool kSplit = sizeof(M) == 2;
  constexpr int kPack = 16 / sizeof(M);
  const Half* weights = static_cast<const Half*>(span.param);
  M* masters = static_cast<M*>(span.master);
  const DType dtype = span.param_dtype;
  const int common = phase<kPack>(masters);
  for_each<kPack>(begin, end, phase<kPack>(weights) == common ? common : -1, [&](int64_t i, auto size) {
    const auto weight = load<size.value>(weights + i);
    auto master = load<size.value>(masters + i);
    with_half(dtype, [&]<class H, class Split>() {
#pragma unroll
      for (int j = 0; j < size.value; ++j) {
        if constexpr (kSplit) {
          const float now = seen<H>(Split::decode(weight[j], master[j]), weight[j]);
          master[j] = Split::remainder(now, weight[j]);
        } else {
          master[j] = seen<H>(master[j], weight[j]);
        }
      }
    });
    store<size.value>(masters + i, master);
  });
}

__global__ void __launch_bounds__(kThreads, kResident) refresh_kernel(const __grid_constant__ Packed packed) {
  const Table table(packed);
  for (Share share(table); share.more(); share.next()) {
    const Span& span = table.spans[share.span];
    const int64_t begin = share.first() * kStepBlock, end = min(share.last() * kStepBlock, span.numel);
    span.has_split() ? take_over<Half>(span, begin, end) : take_over<float>(span, begin, end);
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
