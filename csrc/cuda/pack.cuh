// Values in memory and in registers: several in one access, and what their 16 bits mean.
//
// The widest stream of a kernel moves in 16-byte accesses, and narrower ones lie as many elements wide beside it: the
// threads of a warp then touch consecutive memory in every stream. (A thread that took eight fp32 values beside eight
// halves would write half sectors.)
#pragma once

#include "../codec/noise.h"
#include "../codec/split.h"
#include "../span.h"
#include "table.cuh"

namespace deepfast::cuda {

using Half = uint16_t;  // fp16 or bf16: a span says which

template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T value[kSize];

  __device__ T& operator[](int i) { return value[i]; }
  __device__ T operator[](int i) const { return value[i]; }
};

// Spelled out for a pack: from what could be one access, the compiler makes four on some architectures. "memory":
// single elements are ordinary accesses, and none may move across these.
template <int kSize, class T>
__device__ Pack<T, kSize> load(const T* at) {
  Pack<T, kSize> pack;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof pack == 16) {
    uint32_t word[4];
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "l"(at)
                 : "memory");
    std::memcpy(&pack, word, sizeof pack);
    return pack;
  }
  if constexpr (sizeof pack == 8) {
    uint32_t word[2];
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(at) : "memory");
    std::memcpy(&pack, word, sizeof pack);
    return pack;
  }
#endif
  pack = *reinterpret_cast<const Pack<T, kSize>*>(at);
  return pack;
}

template <int kSize, class T>
__device__ void store(T* at, const Pack<T, kSize>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof pack == 16) {
    uint32_t word[4];
    std::memcpy(word, &pack, sizeof pack);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word[0]), "r"(word[1]), "r"(word[2]),
                 "r"(word[3])
                 : "memory");
    return;
  }
  if constexpr (sizeof pack == 8) {
    uint32_t word[2];
    std::memcpy(word, &pack, sizeof pack);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(word[0]), "r"(word[1]) : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, kSize>*>(at) = pack;
}

inline __device__ float decode(float x, DType) { return x; }

inline __device__ float decode(Half h, DType dtype) {
  return dtype == DType::kBFloat16 ? Bf16::decode(h) : Fp16::decode(h);
}

// What collectives move besides. Integers wrap around, as torch's do.
inline __device__ double decode(double x, DType) { return x; }
inline __device__ uint32_t decode(int32_t x, DType) { return static_cast<uint32_t>(x); }
inline __device__ uint64_t decode(int64_t x, DType) { return static_cast<uint64_t>(x); }

// kMaster: by the rule for weights whose fp32 value is kept elsewhere (csrc/codec/half.h), else torch's.
template <bool kMaster>
__device__ Half encode(float x, DType dtype) {
  if (dtype == DType::kBFloat16) return kMaster ? Bf16::from_master(x) : Bf16::nearest_even(x);
  return kMaster ? Fp16::from_master(x) : Fp16::nearest_even(x);
}

// call.template operator()<H, Split>() with the codecs of a 16-bit type: asked once for many elements.
template <class Call>
__device__ void with_half(DType dtype, const Call& call) {
  if (dtype == DType::kBFloat16) {
    call.template operator()<Bf16, SplitBf16>();
  } else {
    call.template operator()<Fp16, SplitFp16>();
  }
}

// As torch rounds, or as it is.
template <class T>
__device__ T stored(float x, DType dtype) {
  if constexpr (sizeof(T) == 2) return encode<false>(x, dtype);
  return x;
}

// A span's step count when this step is made, by which chance is drawn; 0 where nobody counts.
inline __device__ uint64_t next_step(const Span& span) {
  return span.step ? static_cast<uint64_t>(*span.step + 1.0f) : 0;
}

// How many elements of T lie before the first multiple of kSize elements.
template <int kSize, class T>
__device__ int phase(const T* at) {
  return static_cast<int>((0 - reinterpret_cast<uintptr_t>(at) / sizeof(T)) % kSize);
}

// The elements [begin, end) of a span, by all threads of a block: in packs of kSize from the first aligned one on, what
// lies before and after one by one. phase < 0: the streams are never aligned together, all go one by one.
template <int kSize, class Body>
__device__ void for_each(int64_t begin, int64_t end, int phase, const Body& body) {
  const int64_t head = phase < 0 || begin + phase > end ? end : begin + phase;  // kSize divides begin
  const int64_t tail = head + (end - head) / kSize * kSize;
#pragma unroll 1  // a pack's stores end what can be under way: unrolling would only cost registers
  for (int64_t i = head + threadIdx.x * kSize; i < tail; i += kThreads * kSize) {
    body(i, std::integral_constant<int, kSize>());
  }
  const int64_t before = head - begin, rest = before + end - tail;
#pragma unroll 1
  for (int64_t nth = threadIdx.x; nth < rest; nth += kThreads) {
    body(nth < before ? begin + nth : tail + nth - before, std::integral_constant<int, 1>());
  }
}

}  // namespace deepfast::cuda
