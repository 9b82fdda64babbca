// Sums of squares, in the order of csrc/math/squares.h: the same bits as on a CPU.
//
// kLanes / kSize neighbouring threads add up a block: a thread holds kSize of its lanes, as many as one access brings.
// Where the stream is not aligned, the threads begin before the block, at an aligned element: the lanes are then dealt
// out in another rotation, which changes no sum.
#pragma once

#include <utility>

#include "pack.cuh"

namespace deepfast::cuda {

template <int kSize>
struct Group {
  static constexpr int kMembers = kLanes / kSize;
  static constexpr int kGroups = kThreads / kMembers;

  int member = threadIdx.x % kMembers;
  int index = threadIdx.x / kMembers;
  uint32_t mask = ((1u << kMembers) - 1) << (threadIdx.x % 32 / kMembers * kMembers);

  // load(i, size), and then use(what that gave, i, j, size): elements i .. i + size of the block of n elements that
  // begins at `begin`, row after row, for the lanes from j on. With phase < 0 (never aligned) they come one by one.
  // kRows: how many rows are loaded before the first is used. Count: int64_t, or int where registers are few.
  template <int kRows, class Count, class Load, class Use>
  __device__ void for_each(int64_t begin, Count n, int phase, const Load& load, const Use& use) const {
    const auto body = [&](int64_t i, int j, auto size) {
      auto loaded = load(i, size);
      use(loaded, i, j, size);
    };
    const Count shift = phase > 0 ? phase - kSize : 0;
    const Count mine = shift + member * kSize;
    const auto edge = [&](Count row) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const Count i = row * kLanes + mine + j;
        if (i >= 0 && i < n) body(begin + i, j, std::integral_constant<int, 1>());
      }
    };
    const Count rows = (n - shift + kLanes - 1) / kLanes, whole = phase < 0 ? 0 : (n - shift) / kLanes;
    const Count first = phase < 0 || (shift == 0 && whole > 0) ? 0 : 1;
    if (first == 1) edge(0);
    Count row = first;
    constexpr std::integral_constant<int, kSize> pack;
    if constexpr (kRows > 1) {
#pragma unroll 1
      for (; row + kRows <= whole; row += kRows) {
        const auto at = [&](int nth) { return begin + (row + nth) * kLanes + mine; };
        [&]<int... kNth>(std::integer_sequence<int, kNth...>) {
          decltype(load(begin, pack)) loaded[] = {load(at(kNth), pack)...};
          (use(loaded[kNth], at(kNth), 0, pack), ...);
        }(std::make_integer_sequence<int, kRows>());
      }
    }
#pragma unroll 1
    for (; row < whole; ++row) body(begin + row * kLanes + mine, 0, pack);
#pragma unroll 1
    for (; row < rows; ++row) edge(row);
  }

  template <int kRows, class Count, class Body>
  __device__ void for_each(int64_t begin, Count n, int phase, const Body& body) const {
    for_each<kRows>(
        begin, n, phase, [](int64_t, auto) { return 0; }, [&](int, int64_t i, int j, auto size) { body(i, j, size); });
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

inline __device__ Statistics from_lane(const Statistics& mine, int apart) {
  return {__shfl_xor_sync(~0u, mine.sum_of_squares, apart), __shfl_xor_sync(~0u, mine.non_finite, apart)};
}
inline __device__ Norms from_lane(const Norms& mine, int apart) {
  return {__shfl_xor_sync(~0u, mine.param, apart), __shfl_xor_sync(~0u, mine.direction, apart)};
}

// The sum over a row of partial[n], n <= kFoldLanes, by a warp; in all its lanes.
template <class Total, class Partial>
__device__ Total fold_row(const Partial* partial, int64_t n) {
  constexpr int kWarp = 32, kEach = kFoldLanes / kWarp;
  const int lane = threadIdx.x % kWarp;
  Total sums[kEach] = {};
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (k * kWarp + lane < n) sums[k].add(partial[k * kWarp + lane]);
  }
#pragma unroll
  for (int half = kEach / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) sums[k].add(sums[k + half]);
  }
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) sums[0].add(from_lane(sums[0], apart));
  return sums[0];
}

// The sum over partial[n] by all threads of a block, as thread 0's result. Three levels of rows: n <= 2^24.
template <class Total, class Partial>
__device__ Total fold(const Partial* partial, int64_t n) {
  constexpr int kRow = kFoldLanes;
  __shared__ Total rows[kRow], highest[kRow];
  const int warp = threadIdx.x / 32;
  for (int64_t high = 0; high * kRow * kRow < n; ++high) {
    const Partial* from = partial + high * kRow * kRow;
    const int64_t left = min(n - high * kRow * kRow, static_cast<int64_t>(kRow) * kRow),
                  count = (left + kRow - 1) / kRow;
    for (int64_t row = warp; row < count; row += kThreads / 32) {
      rows[row] = fold_row<Total>(from + row * kRow, min(left - row * kRow, static_cast<int64_t>(kRow)));
    }
    __syncthreads();
    if (warp == 0) highest[high] = fold_row<Total>(rows, count);
    __syncthreads();
  }
  Total total = {};
  if (warp == 0) total = fold_row<Total>(highest, (n + kRow * kRow - 1) / (kRow * kRow));
  return total;
}

// Where a span's rows of sums, and one counter more, have their place, if its blocks come after `blocks` others of as
// many `spans`.
inline __host__ __device__ int64_t fold_slot(int64_t blocks, int64_t spans) { return blocks / kFoldLanes + 2 * spans; }

// The sum over n blocks' sums that are made by many thread blocks: who finishes a row of them last adds it up, and who
// adds the last row adds the rows. (One thread block alone would read all of them at a small part of the bandwidth.)
template <class Total, class Partial>
struct Fold {
  const Partial* partial;  // [n]
  int64_t n;
  Total* rows;         // [n / kFoldLanes, rounded up]
  uint32_t* counters;  // as many, and one

  // By a thread block that has made [begin, end), all threads. sharers(first, last): how many thread blocks make some
  // of [first, last). True in the last thread block of all, whose thread 0 has the total.
  template <class Sharers>
  __device__ bool arrive(int64_t begin, int64_t end, const Sharers& sharers, Total& total) const {
    const int64_t count = (n + kFoldLanes - 1) / kFoldLanes;
    bool last = n == 0;
    for (int64_t row = begin / kFoldLanes; row * kFoldLanes < end; ++row) {
      const int64_t first = row * kFoldLanes, size = min(static_cast<int64_t>(kFoldLanes), n - first);
      if (!last_to_arrive(counters + row, sharers(first, first + size))) continue;
      if (threadIdx.x < 32) total = fold_row<Total>(partial + first, size);
      if (count == 1) return true;
      if (threadIdx.x == 0) rows[row] = total;
      last = last_to_arrive(counters + count, static_cast<uint32_t>(count));
    }
    if (last) total = fold<Total>(rows, count);
    return last;
  }
};

}  // namespace deepfast::cuda
