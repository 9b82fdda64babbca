// As much of NVIDIA's driver as Triton's launcher calls, for machines without a GPU: it says yes and does nothing, but
// for keeping count. What it is asked about the device, an H100 would answer; what it does not know is an error, so
// that nobody goes by an answer that was made up.
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kMostKernels = 4096, kLongestName = 255 };

struct CUfunc_st {
  char name[kLongestName + 1];
  long launches;
};
static struct CUfunc_st kernels[kMostKernels];  // every one that was loaded, also the same one again
static int kernel_count = 0;
static char error[256] = "no error";
static int module, context;  // somewhere to point to

static CUresult refuse(const char* what, int which) {
  snprintf(error, sizeof error, "tests/triton_dry/libcuda.c does not know %s %d", what, which);
  return CUDA_ERROR_NOT_SUPPORTED;
}

// For play.py.
int played_kernels(void) { return kernel_count; }
const char* played_name(int kernel) { return kernels[kernel].name; }
long played_launches(int kernel) { return kernels[kernel].launches; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult result, const char** text) { return *text = error, CUDA_SUCCESS; }

CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return *value = 9, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return *value = 0, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return *value = 132, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return *value = 227 << 10, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return *value = 228 << 10, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      return *value = 64 << 10, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return *value = 32, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
      return *value = 1980000, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
      return *value = 2619000, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      return *value = 5120, CUDA_SUCCESS;
    default:
      return refuse("device attribute", attribute);
  }
}

CUresult cuCtxGetCurrent(CUcontext* current) { return *current = (CUcontext)&context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* retained, CUdevice device) { return cuCtxGetCurrent(retained); }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* loaded, const void* image) {
  if (memcmp(image, "\177ELF", 4) != 0) return refuse("a module that is no machine code", 0);
  return *loaded = (CUmodule)&module, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule loaded) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule loaded, const char* name) {
  if (kernel_count == kMostKernels) return refuse("what to do with so many kernels:", kernel_count);
  *function = &kernels[kernel_count++];
  snprintf((*function)->name, sizeof(*function)->name, "%s", name);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return *value = 1024, CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      return *value = 0, CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      return *value = 0, CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      return *value = 64, CUDA_SUCCESS;
    default:
      return refuse("function attribute", attribute);
  }
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// All memory is the device's, wherever it lies.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr at) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return refuse("pointer attribute", attribute);
  return memcpy(value, &at, sizeof at), CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  if (threads == 0 || threads > 1024) return refuse("a thread block of so many threads:", threads);
  if (config->gridDimX == 0 || config->gridDimY != 1 || config->gridDimZ != 1) return refuse("such a grid", 0);
  if (config->sharedMemBytes > 227 << 10) return refuse("so much shared memory:", config->sharedMemBytes);
  return ++function->launches, CUDA_SUCCESS;
}
