// Inner loops. A block is walked in strips of whole cache lines, and what lies some strips ahead is asked for.
//
// The hardware's prefetcher stops at every 4 KiB page; over streams as many as an optimizer has it leaves a quarter of
// the memory's bandwidth unused (2 cores of a Xeon: reading 31 GB/s without, 42 with; AdamW's four streams 55 and 61).
#pragma once

#include "pack.h"

namespace deepfast::cpu {

constexpr int64_t kStrip = 64;    // elements
constexpr int64_t kAhead = 1024;  // bytes

DF_INLINE int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Which cache what is asked for comes to. Intel's cores can wait for more of it at once in the second, and there the
// figures above are from; two of AMD's Zen 5 stepped fp32 AdamW 1.08 times as fast with the first.
#if defined(__x86_64__)
inline const bool kToFirstCache = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
#else
constexpr bool kToFirstCache = false;
#endif

template <int kLocality>
DF_INLINE void ask(const char* from, DType dtype) {
  __builtin_prefetch(from, 0, kLocality);
  __builtin_prefetch(from + 64, 0, kLocality);
  if (dtype == DType::kFloat32) {
    __builtin_prefetch(from + 128, 0, kLocality);
    __builtin_prefetch(from + 192, 0, kLocality);
  }
}

// Asks for what a stream will read after the strip that begins at element i. An address past the end does no harm.
DF_INLINE void ask_ahead(const void* stream, DType dtype, int64_t i) {
  const char* from = static_cast<const char*>(stream) + i * size_of(dtype) + kAhead;
  kToFirstCache ? ask<3>(from, dtype) : ask<2>(from, dtype);
}

// body(i, V()) for all elements i .. i + V's width of n, Pack by Pack, what is left over one by one; no element may
// depend on another. ahead(i) before each strip.
template <class Ahead, class Body>
DF_INLINE void for_each(int64_t n, const Ahead& ahead, const Body& body) {
  int64_t i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    ahead(i);
#pragma omp simd
    for (int64_t k = i; k < i + kStrip; k += kWidth<Pack>) body(k, Pack());
  }
  for (; i + kWidth<Pack> <= n; i += kWidth<Pack>) body(i, Pack());
  for (; i < n; ++i) body(i, float());
}

}  // namespace deepfast::cpu
