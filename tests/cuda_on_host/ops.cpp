// The CUDA backend for CPU tensors, its kernels run on the host: torch.ops.deepfast_cuda_on_host.
#include "../../csrc/bindings/cuda_collective.h"
#include "../../csrc/bindings/operators.h"
#include "cuda_runtime.h"

using OnHost = deepfast::bindings::Operators<deepfast::bindings::CudaOn<at::kCPU>>;

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** ret_stream) {
  *ret_stream = reinterpret_cast<void*>(1);
  return 0;
}

TORCH_LIBRARY(deepfast_cuda_on_host, library) {
  for (const char* schema : deepfast::bindings::kSchemas) library.def(schema);
  library.def("launches() -> int", [] { return cuda_on_host::launches; });
  library.def("capture(bool on) -> ()", [](bool on) { cuda_on_host::capturing = on; });
  OnHost::define_plan(library, "Plan");
  deepfast::bindings::define_collectives(library);
}

TORCH_LIBRARY_IMPL(deepfast_cuda_on_host, CPU, library) {
  OnHost::implement(library);
  library.impl("collective_", &deepfast::bindings::collective);
}
