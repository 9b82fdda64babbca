// As much of CUDA as the kernels use, on a CPU: put before CUDA's own headers on the include path, it lets a C++
// compiler build the very same .cu files, sanitizers included.
//
// Thread blocks run one after the other, in an order drawn anew for each launch; the threads of a block are fibers that
// take turns wherever they wait for each other, in an order drawn anew for each turn, and each turn half of the warps
// stay behind. So a missing barrier shows (some thread reads before another has written), and a barrier that not all
// threads reach is an error. In a cooperative launch of several ranks (the grid's second dimension) each rank is a
// thread of the system. What cannot show: a race between thread blocks of one rank, or between threads that no barrier
// separates and that happen to take turns well.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define CUDA_ON_HOST
#define __host__
#define __device__
#define __global__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_host {

inline int processors = 3;      // of the device that is played
inline bool capturing = false;  // whether its streams say that they are being captured
inline int64_t launches = 0;    // so far
inline const void* kernel;      // the last one
// Whether the device reports that it has failed: how programs end then.
inline const bool lost = std::getenv("CUDA_ON_HOST_LOST") != nullptr;
void run(dim3 grid, dim3 block, const std::function<void()>& kernel);
void wait_for_block();
void exchange(uint32_t mask, const void* mine, void* theirs, size_t size, int apart);
bool any_of_block(bool mine);
void let_others_run();  // where a thread waits for another rank

}  // namespace cuda_on_host

inline constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { cuda_on_host::wait_for_block(); }
inline int __syncthreads_or(int mine) { return cuda_on_host::any_of_block(mine); }
inline void __threadfence() {}
inline void __threadfence_system() {}

template <class T>
T __shfl_xor_sync(uint32_t mask, T mine, int apart) {
  T theirs;
  cuda_on_host::exchange(mask, &mine, &theirs, sizeof(T), apart);
  return theirs;
}

inline uint32_t atomicAdd(uint32_t* to, uint32_t x) {
  const uint32_t before = *to;
  *to += x;
  return before;
}

template <class A, class B>
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B>
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaStream_t = struct CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "an error on the host"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = cuda_on_host::processors, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cuda_on_host::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cuda_on_host::lost ? cudaErrorLaunchFailure : cudaSuccess; }
// Of exactly this size, so that an access beside it is seen.
template <class T>
cudaError_t cudaMallocManaged(T** at, size_t size) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, size) != 0) std::abort();
  return *at = static_cast<T*>(memory), cudaSuccess;
}
inline cudaError_t cudaFree(void* at) { return std::free(at), cudaSuccess; }
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  ++cuda_on_host::launches;
  cuda_on_host::kernel = reinterpret_cast<const void*>(kernel);
  cuda_on_host::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
