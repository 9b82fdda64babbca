// Inner loops. A block is walked in strips of whole cache lines, and what lies some strips ahead is asked for.
//
// The hardware's prefetcher stops at every 4 KiB page; over streams as many as an optimizer has it leaves a quarter of
// the memory's bandwidth unused (2 cores of a Xeon: reading 31 GB/s without, 42 with; AdamW's four streams 55 and 61).
#pragma once

#include "pack.h"

namespace deepfast::cpu {

constexpr int64_t kStrip = 64;  // elements

DF_INLINE int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// What is asked for comes to the second cache of Intel's cores, which can wait for more of it at once there (the
// figures above are from one), and to the first of AMD's, the further ahead the fewer streams there are: two of Zen 5
// step 1.05 to 1.15 times as fast so.
#if defined(__x86_64__)
inline const bool kToFirstCache = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
#else
constexpr bool kToFirstCache = false;
#endif

// How far ahead one of several streams is asked for, in bytes.
inline int64_t ahead_of(int streams) { return kToFirstCache ? 8192 / streams : 1024; }

template <int kLocality>
DF_INLINE void ask(const char* from, DType dtype) {
  __builtin_prefetch(from, 0, kLocality);
  __builtin_prefetch(from + 64, 0, kLocality);
  if (dtype == DType::kFloat32) {
    __builtin_prefetch(from + 128, 0, kLocality);
    __builtin_prefetch(from + 192, 0, kLocality);
  }
}

// Asks for what a stream will read `ahead` bytes after element i, with which a strip begins; 0: for nothing. An address
// past the end does no harm.
DF_INLINE void ask_ahead(const void* stream, DType dtype, int64_t i, int64_t ahead) {
  if (ahead == 0) return;
  const char* from = static_cast<const char*>(stream) + i * size_of(dtype) + ahead;
  kToFirstCache ? ask<3>(from, dtype) : ask<2>(from, dtype);
}

// body(i, V()) for all elements i .. i + V's width of n, Pack by Pack, what is left over one by one. ahead(i) before
// each strip. kIndependent: no element depends on another, so that where a Pack is one float the compiler may
// vectorize.
template <bool kIndependent = true, class Ahead, class Body>
DF_INLINE void for_each(int64_t n, const Ahead& ahead, const Body& body) {
  int64_t i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    ahead(i);
    if constexpr (kIndependent && kWidth<Pack> == 1) {
#pragma omp simd
      for (int64_t k = i; k < i + kStrip; ++k) body(k, Pack());
    } else {
      for (int64_t k = i; k < i + kStrip; k += kWidth<Pack>) body(k, Pack());
    }
  }
  for (; i + kWidth<Pack> <= n; i += kWidth<Pack>) body(i, Pack());
  for (; i < n; ++i) body(i, float());
}

}  // namespace deepfast::cpu
