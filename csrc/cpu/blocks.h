// A table of spans cut into fixed blocks, and the blocks dealt out to threads.
//
// Blocks do not depend on the number of threads, so a reduction that adds its partial results in block order gives the
// same bits for any number of them. Each thread gets one contiguous range: it stays on the pages it touched first.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../math/squares.h"
#include "../span.h"

namespace deepfast::cpu {

constexpr int64_t kSerialBelow = 32 * 1024;  // elements: less is not worth waking a thread for

class Blocks {
 public:
  Blocks(const Span* spans, int64_t count, int64_t block = kStepBlock)
      : spans_(spans), block_(block), first_(count + 1, 0) {
    for (int64_t i = 0; i < count; ++i) {
      first_[i + 1] = first_[i] + (spans[i].numel + block - 1) / block;
      elements_ += spans[i].numel;
    }
    threads_ = elements_ < kSerialBelow ? 1 : static_cast<int>(std::min<int64_t>(omp_get_max_threads(), size()));
  }

  int64_t size() const { return first_.back(); }
  int64_t first(int64_t span) const { return first_[span]; }
  int64_t elements() const { return elements_; }

  // body(span index, offset of the block's first element, its number of elements, block index); a thread ends with
  // finish().
  template <class Body, class Finish>
  void parallel_for(const Body& body, const Finish& finish) const {
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    {
      const int64_t begin = size() * omp_get_thread_num() / omp_get_num_threads();
      const int64_t end = size() * (omp_get_thread_num() + 1) / omp_get_num_threads();
      int64_t span = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
      for (int64_t block = begin; block < end; ++block) {
        while (block >= first_[span + 1]) ++span;
        const int64_t offset = (block - first_[span]) * block_;
        body(span, offset, std::min(block_, spans_[span].numel - offset), block);
      }
      finish();
    }
  }

  template <class Body>
  void parallel_for(const Body& body) const {
    parallel_for(body, [] {});
  }

 private:
  const Span* spans_;
  const int64_t block_;         // elements
  std::vector<int64_t> first_;  // block index at which each span begins
  int64_t elements_ = 0;
  int threads_;
};

}  // namespace deepfast::cpu
