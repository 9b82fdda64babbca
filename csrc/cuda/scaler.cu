// The loss scaler's transition.
#include "table.cuh"

namespace deepfast::cuda {
namespace {

struct alignas(16) Pointers {
  int64_t count;
  const char* external;
  char bytes[kTableBytes];
};

__global__ void scaler_kernel(ScalerState* state, const __grid_constant__ Pointers found, ScalerOptions options) {
  const float* const* found_inf = reinterpret_cast<const float* const*>(found.external ? found.external : found.bytes);
  bool overflow = false;
  for (int64_t i = threadIdx.x; i < found.count; i += kThreads) overflow |= *found_inf[i] > 0.0f;
  overflow = __syncthreads_or(overflow);
  if (threadIdx.x == 0) *state = transition(*state, overflow, options);
}

}  // namespace

int64_t scaler_table_bytes(int64_t count) {
  const int64_t size = count * sizeof(float*);
  return size <= kTableBytes ? 0 : size;
}

void scaler_update(ScalerState* state, const float* const* found_inf, int64_t count, char* table,
                   const ScalerOptions& options, Stream stream) {
  const int64_t size = count * sizeof(float*);
  Pointers found;
  found.count = count;
  found.external = size <= kTableBytes ? nullptr : table;
  if (found.external) {
    send(reinterpret_cast<const char*>(found_inf), size, table, nullptr, stream);
  } else {
    std::memcpy(found.bytes, found_inf, size);
  }
  launch(scaler_kernel, 1, kThreads, stream, state, found, options);
}

}  // namespace deepfast::cuda
