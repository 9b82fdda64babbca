// One read of the gradients: the sum of their squares, and whether all are finite.
#include "blocks.h"
#include "convert.h"
#include "kernels.h"

namespace deepfast::cpu {
namespace {

constexpr int kLanes = 64;  // fixed, whatever the vector width: the order of the additions must not depend on it

// g[n] -> their statistics. The largest magnitude decides how the squares are added: in fp32 lanes where they neither
// overflow nor vanish, else in fp64.
Statistics block_statistics(const float* g, int64_t n) {
  float sum[kLanes] = {};
  uint32_t largest[kLanes] = {};
  const auto add = [&](int lane, float x) {
    sum[lane] = fma(x, x, sum[lane]);
    const uint32_t magnitude = to_bits(x) & ~kSign;
    largest[lane] = largest[lane] > magnitude ? largest[lane] : magnitude;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) add(lane, g[i + lane]);
  }
  for (int lane = 0; i + lane < n; ++lane) add(lane, g[i + lane]);

  double total = 0.0;
  uint32_t magnitude = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    total += sum[lane];
    magnitude = std::max(magnitude, largest[lane]);
  }
  const bool non_finite = magnitude >= kInfinity;
  const float bound = from_bits(magnitude);
  if (!non_finite && magnitude != 0 && (bound > 0x1p55f || bound < 0x1p-55f)) {
    total = 0.0;
    for (int64_t j = 0; j < n; ++j) total += static_cast<double>(g[j]) * g[j];
  }
  return {total, non_finite ? 1.0 : 0.0};
}

}  // namespace

Statistics statistics(const Span* spans, int64_t count) {
  const Blocks blocks(spans, count);
  std::vector<Statistics> partial(blocks.size());
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t block) {
    alignas(64) float staged[kBlock];
    partial[block] = block_statistics(decode(spans[s].grad, spans[s].grad_dtype, offset, n, staged), n);
  });
  Statistics total = {0.0, 0.0};
  for (const Statistics& p : partial) {
    total.sum_of_squares += p.sum_of_squares;
    total.non_finite += p.non_finite;
  }
  return total;
}

}  // namespace deepfast::cpu
