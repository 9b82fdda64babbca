// Masters that take over what somebody else has written to their 16-bit weights.
#include "blocks.h"
#include "kernels.h"
#include "strips.h"

namespace deepfast::cpu {

void refresh(const Span* spans, int64_t count) {
  const Blocks blocks(spans, count);
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t) {
    const DType dtype = spans[s].param_dtype;
    const bool split = spans[s].has_split();
    const uint16_t* halves = static_cast<const uint16_t*>(spans[s].param) + offset;
    float* master = static_cast<float*>(spans[s].master) + offset;
    uint16_t* remainders = static_cast<uint16_t*>(spans[s].master) + offset;
    const int64_t distance = ahead_of(2);
    const auto ahead = [&](int64_t i) {
      ask_ahead(halves, dtype, i, distance);
      split ? ask_ahead(remainders, dtype, i, distance) : ask_ahead(master, DType::kFloat32, i, distance);
    };
    for_each(n, ahead, [&](int64_t i, auto v) {
      const auto half = load(halves + i, v);
      const auto weight = decode(half, dtype);
      const auto kept = split ? decode_split(half, load(remainders + i, v), dtype) : load(master + i, v);
      const auto now = select(decode(from_master(kept, dtype), dtype) == weight, kept, weight);
      split ? store(remainder(now, half, dtype), remainders + i) : store(now, master + i);
    });
  });
}

}  // namespace deepfast::cpu
