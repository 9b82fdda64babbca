// One read of the gradients: the sum of their squares, and whether all are finite.
#include "blocks.h"
#include "kernels.h"
#include "reduce.h"

namespace deepfast::cpu {

constexpr int64_t kReadBlock = 4096;  // elements: each block costs a reduction

Statistics statistics(const Span* spans, int64_t count) {
  const Blocks blocks(spans, count, kReadBlock);
  std::vector<BlockSum> partial(blocks.size());
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t block) {
    partial[block] = sum_of_squares(spans[s].grad, spans[s].grad_dtype, offset, n);
  });
  Statistics total = {0.0, 0.0};
  for (const BlockSum& p : partial) {
    total.sum_of_squares += p.sum_of_squares;
    total.non_finite += p.non_finite;
  }
  return total;
}

}  // namespace deepfast::cpu
