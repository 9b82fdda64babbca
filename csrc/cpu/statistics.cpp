// One read of the gradients: the sum of their squares, and whether all are finite.
#include "blocks.h"
#include "convert.h"
#include "kernels.h"
#include "reduce.h"

namespace deepfast::cpu {

Statistics statistics(const Span* spans, int64_t count) {
  const Blocks blocks(spans, count);
  std::vector<BlockSum> partial(blocks.size());
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t block) {
    alignas(64) float staged[kBlock];
    partial[block] = sum_of_squares(decode(spans[s].grad, spans[s].grad_dtype, offset, n, staged), n);
  });
  Statistics total = {0.0, 0.0};
  for (const BlockSum& p : partial) {
    total.sum_of_squares += p.sum_of_squares;
    total.non_finite += p.non_finite;
  }
  return total;
}

}  // namespace deepfast::cpu
