// One read of the gradients: the sum of their squares, and whether all are finite.
#include "blocks.h"
#include "kernels.h"
#include "reduce.h"

namespace deepfast::cpu {

Statistics statistics(const Span* spans, int64_t count) {
  const Blocks blocks(spans, count, kReadBlock);
  std::vector<double> partial(blocks.size());
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t block) {
    partial[block] = sum_of_squares(spans[s].grad, spans[s].grad_dtype, offset, n);
  });
  return fold<Statistics>(partial.data(), blocks.size());
}

}  // namespace deepfast::cpu
