// Sums of squares, in the order of csrc/math/squares.h: the same bits as on a CPU.
//
// kLanes / kSize neighbouring threads add up a block: a thread holds kSize of its lanes, as many as one access brings.
// Where the stream is not aligned, the threads begin before the block, at an aligned element: the lanes are then dealt
// out in another rotation, which changes no sum.
#pragma once

#include "pack.cuh"

namespace deepfast::cuda {

template <int kSize>
struct Group {
  static constexpr int kMembers = kLanes / kSize;
  static constexpr int kGroups = kThreads / kMembers;

  int member = threadIdx.x % kMembers;
  int index = threadIdx.x / kMembers;
  uint32_t mask = ((1u << kMembers) - 1) << (threadIdx.x % 32 / kMembers * kMembers);

  // body(i, j, size): elements i .. i + size of the block of n elements that begins at `begin`, row after row, for the
  // lanes from j on. With
  // phase < 0 (never aligned) they come one by one. kRows: how many rows are under way at once.
  template <int kRows, class Body>
  __device__ void for_each(int64_t begin, int64_t n, int phase, const Body& body) const {
    const int64_t shift = phase > 0 ? phase - kSize : 0;
    const int64_t mine = shift + member * kSize;
    const auto edge = [&](int64_t row) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int64_t i = row * kLanes + mine + j;
        if (i >= 0 && i < n) body(begin + i, j, std::integral_constant<int, 1>());
      }
    };
    const int64_t rows = (n - shift + kLanes - 1) / kLanes, whole = phase < 0 ? 0 : (n - shift) / kLanes;
    const int64_t first = phase < 0 || (shift == 0 && whole > 0) ? 0 : 1;
    if (first == 1) edge(0);
    int64_t row = first;
#pragma unroll kRows
    for (; row < whole; ++row) body(begin + row * kLanes + mine, 0, std::integral_constant<int, kSize>());
#pragma unroll 1
    for (; row < rows; ++row) edge(row);
  }

  // lane[kSize] of every member -> their sum, in all of them.
  __device__ double pairwise(double (&lane)[kSize]) const {
#pragma unroll
    for (int apart = kMembers / 2; apart > 0; apart /= 2) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) lane[j] += __shfl_xor_sync(mask, lane[j], apart);
    }
#pragma unroll
    for (int half = kSize / 2; half > 0; half /= 2) {
#pragma unroll
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
  }

  __device__ uint32_t largest(uint32_t x) const {
#pragma unroll
    for (int apart = kMembers / 2; apart > 0; apart /= 2) x = max(x, __shfl_xor_sync(mask, x, apart));
    return x;
  }

  // The sum of a block's lanes; `again(lanes)` adds its squares in fp64, if that is needed.
  template <class Again>
  __device__ double total(const Lane (&lanes)[kSize], const Again& again) const {
    double sums[kSize];
    uint32_t magnitude = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      sums[j] = lanes[j].sum;
      magnitude = max(magnitude, lanes[j].largest);
    }
    if (needs_fp64(largest(magnitude))) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) sums[j] = 0.0;
      again(sums);
    }
    return pairwise(sums);
  }
};

// The sum over partial[n] by all threads of a block, as thread 0's result.
template <class Total, class Partial>
__device__ Total fold(const Partial* partial, int64_t n) {
  static_assert(kThreads == kFoldLanes);
  __shared__ Total lanes[kFoldLanes];
  Total total = {};
  for (int64_t i = threadIdx.x; i < n; i += kFoldLanes) total.add(partial[i]);
  lanes[threadIdx.x] = total;
  for (int half = kFoldLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lanes[threadIdx.x].add(lanes[threadIdx.x + half]);
  }
  return lanes[0];
}

}  // namespace deepfast::cuda
