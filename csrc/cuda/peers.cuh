// How thread blocks of different ranks wait for each other: flags in the memory of the one who waits.
#pragma once

#include <atomic>

#include "collectives.h"
#include "table.cuh"

namespace deepfast::cuda {

// Everything that the thread block wrote before is seen by whoever sees `value`: the barrier that lies between orders
// it before the release, and a release covers all that is ordered before it, whichever thread wrote it.
inline __device__ void raise(uint32_t* flag, uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#else
  std::atomic_ref(*flag).store(value, std::memory_order_release);
#endif
}

inline __device__ uint32_t look(const uint32_t* flag) {
#if defined(__CUDA_ARCH__)
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
#else
  return std::atomic_ref(*const_cast<uint32_t*>(flag)).load(std::memory_order_acquire);
#endif
}

// The one place where a kernel waits for another rank. False: the host has given up.
inline __device__ bool wait_for(const uint32_t* flag, uint32_t value, const Status* status) {
  constexpr int kLook = 256;  // how often: the host's memory is far away
  for (int spin = 1; static_cast<int32_t>(look(flag) - value) < 0; ++spin) {
    if (spin % kLook == 0 && look(&status->give_up) != 0) return false;
#if defined(CUDA_ON_HOST)
    cuda_on_host::let_others_run();
#endif
  }
  return true;
}

struct Meetings {
  const Call& call;
  Shared& own;
  Meeting& mine;
  const uint32_t operation;

  __device__ explicit Meetings(const Call& call)
      : call(call), own(of(call.rank)), mine(own.meeting[blockIdx.x]), operation(own.operations) {}

  __device__ Shared& of(int rank) const { return *reinterpret_cast<Shared*>(call.shared[rank]); }
  __device__ char* stage(int rank) const { return call.shared[rank] + kStageAt + operation % 2 * kOneShot; }
  __device__ double* sums(int rank) const { return reinterpret_cast<double*>(call.shared[rank] + kSumsAt); }

  // Until all namesakes of this thread block are here. All threads must call it. False: the operation is over.
  __device__ bool meet() {
    __syncthreads();
    const uint32_t nth = mine.count + 1;
    bool missing = false;
    if (threadIdx.x < call.ranks) {
      const int peer = threadIdx.x;
      raise(&of(peer).meeting[blockIdx.x].arrived[call.rank], nth);
      missing = !wait_for(&mine.arrived[peer], nth, call.status);
      if (missing) call.status->missing[peer] = 1;
    }
    missing = __syncthreads_or(missing);
    if (threadIdx.x == 0) mine.count = nth;
    return !missing;
  }

  // What follows a failure: nothing that this rank has still queued may look like its part of a later operation.
  __device__ void fail() { own.broken = 1; }

  // The first meeting, where all say what they are about to do. (Whoever still read what was said in the operation
  // before the last has not come to the last one, and this rank has been there.)
  __device__ bool begin() {
    if (threadIdx.x == 0) {
      mine.said[operation % 2] = {call.kind, call.in, call.out, call.numel, call.place, call.factor, call.measured()};
      call.status->kind = call.kind;
      call.status->begun = operation + 1;
    }
    if (!meet()) return false;
    bool differs = false;
    if (threadIdx.x < call.ranks) {
      differs = !(of(threadIdx.x).meeting[blockIdx.x].said[operation % 2] == mine.said[operation % 2]);
      if (differs) call.status->disagree = 1;
    }
    return !__syncthreads_or(differs);
  }

  // Whether this is the rank's last thread block to come here.
  __device__ bool end() {
    const bool last = last_to_arrive(&own.ended, gridDim.x);
    if (last && threadIdx.x == 0) {
      own.operations = operation + 1;
      call.status->ended = operation + 1;
    }
    return last;
  }
};

}  // namespace deepfast::cuda
