// torch.ops.deepfast.* for CPU tensors, and torch.classes.deepfast.Plan.
#include "cpu.h"
#include "operators.h"

TORCH_LIBRARY(deepfast, library) {
  for (const char* schema : deepfast::bindings::kSchemas) library.def(schema);
  deepfast::bindings::Operators<deepfast::bindings::Cpu>::define_plan(library, "Plan");
}

TORCH_LIBRARY_IMPL(deepfast, CPU, library) {
  deepfast::bindings::Operators<deepfast::bindings::Cpu>::implement(library);
}
