// torch.ops.deepfast.* for CUDA tensors, and torch.classes.deepfast.CudaPlan. (The schemas are ops.cpp's.)
#include "cuda_collective.h"
#include "operators.h"

TORCH_LIBRARY_FRAGMENT(deepfast, library) {
  deepfast::bindings::Operators<deepfast::bindings::Cuda>::define_plan(library, "CudaPlan");
  deepfast::bindings::define_collectives(library);
}

TORCH_LIBRARY_IMPL(deepfast, CUDA, library) {
  deepfast::bindings::Operators<deepfast::bindings::Cuda>::implement(library);
  library.impl("collective_", &deepfast::bindings::collective);
}
