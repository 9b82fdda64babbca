// A list of spans as a kernel sees it: in the launch's own parameters, or in device memory where it is too long.
//
// A few dozen spans travel with the launch, without a copy, a wait or memory that somebody has to keep. What is longer
// is kept in device memory; what has changed of it is written there by kernels that take it as their parameters, so a
// graph holds all it needs. (All of a launch's parameters are sent whether they are used or not: hence not the 32,764
// bytes that a kernel may take.)
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"

namespace deepfast::cuda {

constexpr int kThreads = 256;
constexpr int kResident = 2;             // thread blocks a multiprocessor holds at least: up to 128 registers a thread
constexpr int kTableBytes = 4096 - 256;  // the rest: a kernel's other parameters

struct alignas(16) Packed {
  int64_t count, blocks;
  const char* external;  // null: `bytes` hold the table
  char bytes[kTableBytes];
};
static_assert(sizeof(Packed) + 128 <= 4096);

// spans[count], then the block at which each begins [count + 1], then the rows of hyperparameters.
struct Table {
  const Span* spans;
  const int64_t* first;
  const Hyper* hyper;
  int64_t count, blocks;

  __device__ explicit Table(const Packed& packed) : count(packed.count), blocks(packed.blocks) {
    const char* base = packed.external ? packed.external : packed.bytes;
    spans = reinterpret_cast<const Span*>(base);
    first = reinterpret_cast<const int64_t*>(spans + count);
    hyper = reinterpret_cast<const Hyper*>(first + count + 1);
  }
};

// One thread block's share of the table: a run of consecutive blocks, span by span. It meets few spans, so what has to
// be found out for each costs little, and the shares differ by one block at most.
struct Share {
  const Table& table;
  int64_t block, end;  // what is left
  int64_t span;

  __device__ explicit Share(const Table& table)
      : table(table), block(begin(blockIdx.x)), end(begin(blockIdx.x + 1)), span(0) {
    int64_t after = table.count;  // the last span that begins at or before `block`
    while (after - span > 1) {
      const int64_t middle = span + (after - span) / 2;
      (table.first[middle] <= block ? span : after) = middle;
    }
  }

  __device__ bool more() {
    while (block < end && block >= table.first[span + 1]) ++span;
    return block < end;
  }
  __device__ int64_t first() const { return block - table.first[span]; }  // within the span
  __device__ int64_t last() const { return min(end, table.first[span + 1]) - table.first[span]; }
  __device__ void next() { block = table.first[span] + last(); }

  // How many thread blocks have a share in the table's blocks [first, last).
  __device__ uint32_t sharers(int64_t first, int64_t last) const {
    return static_cast<uint32_t>(owner(last - 1) - owner(first) + 1);
  }

 private:
  __device__ int64_t begin(int64_t of) const { return table.blocks * of / gridDim.x; }
  __device__ int64_t owner(int64_t b) const { return ((b + 1) * gridDim.x - 1) / table.blocks; }
};

// Whether this thread block is the last of `sharers` to arrive; it then sees what the others wrote before. The counter
// is left at zero. All threads of the block must call it.
inline __device__ bool last_to_arrive(uint32_t* counter, uint32_t sharers) {
  __shared__ bool last;
  __threadfence();  // what this thread wrote, before the arrival that announces it
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1u) == sharers - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// On the host.

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("deepfast: ") + what + ": " + cudaGetErrorString(error));
}

// The one way a kernel is launched. Where the grid has two dimensions, its thread blocks wait for each other: the
// device holds all at once, or it is an error.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, Stream stream,
            const std::type_identity_t<std::remove_cv_t<std::remove_reference_t<Parameters>>>&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = grid.y > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "a kernel could not be launched");
}

// How many thread blocks of a kernel a multiprocessor holds at once. Asked once: the answer takes microseconds.
inline int resident(const void* kernel, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, is_new] = known.try_emplace({kernel, device}, 1);
  if (is_new) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at->second, kernel, kThreads, 0), "a kernel does not fit");
  }
  return std::max(at->second, 1);
}

// As many thread blocks as the device holds at once, but no more than there are blocks of elements.
template <class... Parameters>
int64_t persistent_grid(void (*kernel)(Parameters...), int64_t blocks) {
  int device = 0, processors = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "the device does not answer");
  const int each = resident(reinterpret_cast<const void*>(kernel), device);
  return std::clamp<int64_t>(blocks, 1, processors * each);
}

// Where nothing is added up, a thread block takes a few blocks of elements, and a multiprocessor that is ahead of the
// others takes more thread blocks: on an H200, a step gets from 0.90 or 0.92 of a copy's speed to 0.91 or 0.96.
inline int64_t elementwise_grid(int64_t blocks) {
  constexpr int64_t kEach = 8;
  return std::max<int64_t>((blocks + kEach - 1) / kEach, 1);
}

inline int64_t blocks_of(const Span& span, int64_t block) { return (span.numel + block - 1) / block; }

inline int64_t blocks_of(const Job& job, int64_t block) {
  int64_t blocks = 0;
  for (int64_t s = 0; s < job.count; ++s) blocks += blocks_of(job.spans[s], block);
  return blocks;
}

inline int64_t bytes_of(const Job& job) {
  return job.count * sizeof(Span) + (job.count + 1) * sizeof(int64_t) + job.groups * sizeof(Hyper);
}

inline int64_t table_bytes(const Job& job) { return bytes_of(job) <= kTableBytes ? 0 : bytes_of(job); }

void send(const char* bytes, int64_t size, char* table, char* sent, Stream stream);

// The table of a job whose spans are cut into blocks of `block` elements.
inline void pack(Packed& packed, const Job& job, int64_t block, const Workspace& workspace, Stream stream) {
  const int64_t size = bytes_of(job);
  const bool fits = size <= kTableBytes;
  std::vector<char> longer(fits ? 0 : size);
  char* base = fits ? packed.bytes : longer.data();
  Span* spans = reinterpret_cast<Span*>(base);
  int64_t* first = reinterpret_cast<int64_t*>(spans + job.count);
  std::copy(job.spans, job.spans + job.count, spans);
  first[0] = 0;
  for (int64_t s = 0; s < job.count; ++s) first[s + 1] = first[s] + blocks_of(job.spans[s], block);
  std::copy(job.hyper, job.hyper + job.groups, reinterpret_cast<Hyper*>(first + job.count + 1));
  packed.count = job.count;
  packed.blocks = first[job.count];
  packed.external = fits ? nullptr : workspace.table;
  if (!fits) send(base, size, workspace.table, workspace.sent, stream);
}

}  // namespace deepfast::cuda
