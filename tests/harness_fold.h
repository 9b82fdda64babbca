// The sum of many blocks' sums by one thread block, by itself: more of them than any case of a step could make.
#pragma once

#include "../csrc/cuda/reduce.cuh"
#include "harness.h"

namespace deepfast {

__global__ void fold_kernel(const double* partial, int64_t n, Statistics* out) {
  const Statistics total = cuda::fold<Statistics>(partial, n);
  if (threadIdx.x == 0) *out = total;
}

// The order of csrc/math/squares.h: rows of kFoldLanes pairwise, then the rows, until there is one.
inline Statistics folded(std::vector<Statistics> sums) {
  do {
    sums.resize((sums.size() + kFoldLanes - 1) / kFoldLanes * kFoldLanes);
    for (int half = kFoldLanes / 2; half > 0; half /= 2) {
      for (size_t i = 0; i < sums.size(); ++i) {
        if (i % kFoldLanes < static_cast<size_t>(half)) sums[i].add(sums[i + half]);
      }
    }
    for (size_t row = 0; row < sums.size() / kFoldLanes; ++row) sums[row] = sums[row * kFoldLanes];
    sums.resize(sums.size() / kFoldLanes);
  } while (sums.size() > 1);
  return sums.empty() ? Statistics() : sums[0];
}

// Many blocks' sums by one thread block, as collectives have them.
inline void fold_case(int64_t n) {
  doing = "a sum of " + std::to_string(n) + " blocks' sums";
  Array<double> partial(n);
  for (double& sum : partial) sum = std::ldexp(uniform(), static_cast<int>(below(60)));
  if (n > 0 && chance(10)) partial[below(n)] = INFINITY;
  std::vector<Statistics> each(n);
  for (int64_t i = 0; i < n; ++i) each[i].add(partial[i]);
  Array<Statistics> got(1);
  cuda::launch(fold_kernel, 1, cuda::kThreads, nullptr, partial.data(), n, got.data());
  finish("a sum");
  const Statistics expected = folded(each);
  require(std::memcmp(&expected, got.data(), sizeof expected) == 0, "another sum");
}

}  // namespace deepfast
