// Moments in 8 bits: a block's new values wait in shared memory until all of a group's are known.
//
// 16 neighbouring threads encode a group, four elements each. Those are the same four that a thread has computed, where
// the streams are aligned: then nobody waits for anybody but in his warp.
#pragma once

#include "../codec/int8.h"
#include "pack.cuh"

namespace deepfast::cuda {

// Whether some of a span's moments are in groups.
inline __device__ bool has_groups(const Span& span, int moments) {
  bool some = false;
  for (int k = 0; k < moments; ++k) some |= is_grouped(span.moment_dtype[k]);
  return some;
}

// New values of a block of kStepBlock elements. In shared memory.
template <int kMoments>
struct Waiting {
  alignas(16) float value[kMoments][kStepBlock];
  Dither dither[kMoments];  // of the span's next step

  template <int kSize>
  __device__ void put(int k, int64_t i, const Pack<float, kSize>& values) {
    *reinterpret_cast<Pack<float, kSize>*>(&value[k][i % kStepBlock]) = values;
  }
  __device__ void draw(const Span& span) {
    for (int k = 0; k < kMoments; ++k) dither[k] = Dither::of(span.seed, next_step(span), k);
  }
};

template <int kMoments>
__device__ Waiting<kMoments>& waiting() {
  __shared__ Waiting<kMoments> shared;
  return shared;
}

// A thread's part of its group, whose word is then there, too. element: where in the whole parameter its first one is.
template <bool kSigned>
__device__ uint32_t encode(const Pack<float, 4>& values, Dither dither, uint32_t element, uint16_t& word) {
  uint32_t greatest = 0, negated = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t size = to_bits(magnitude(values[j]));
    greatest = max(greatest, size);
    negated = max(negated, 0u - size);
  }
#pragma unroll
  for (int apart = kGroup / 4 / 2; apart > 0; apart /= 2) {
    greatest = max(greatest, __shfl_xor_sync(~0u, greatest, apart));
    if constexpr (!kSigned) negated = max(negated, __shfl_xor_sync(~0u, negated, apart));
  }
  word = Int8<kSigned>::word_of(greatest, negated);
  const auto form = Int8<kSigned>::of(word);
  uint32_t codes = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) codes |= uint32_t{form.encode(values[j], dither.bits(element + j))} << 8 * j;
  return codes;
}

// What waits of the elements [begin, begin + n), by all threads. What a short group lacks is zeros.
template <class S>
__device__ void encode_groups(const S& streams, const Span& span, int64_t begin, int n) {
  static_assert(kStepBlock == 4 * kThreads);
  const auto& all = waiting<S::Rule::kMoments>();
  const int at = static_cast<int>(threadIdx.x) * 4;
  const auto element = static_cast<uint32_t>(span.first + begin) + at;
#pragma unroll
  for (int k = 0; k < S::Rule::kMoments; ++k) {
    const auto& moment = streams.moment[k];
    if (!moment.grouped()) continue;
    auto values = *reinterpret_cast<const Pack<float, 4>*>(&all.value[k][at]);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = at + j < n ? values[j] : 0.0f;
    uint16_t word;
    const uint32_t codes = moment.dtype == DType::kInt8 ? encode<true>(values, all.dither[k], element, word)
                                                        : encode<false>(values, all.dither[k], element, word);
    if (at / kGroup * kGroup >= n) continue;
    *reinterpret_cast<uint32_t*>(moment.at + begin + at) = codes;
    if (at % kGroup == 0) *moment.word(begin + at) = word;
  }
}

// for_each, a block of elements at a time, each of which is encoded then. begin: a multiple of kStepBlock. (One pack a
// thread: for_each itself would need more registers than there are.)
template <class S, class Body>
__device__ void for_each_encoding(const S& streams, const Span& span, int64_t begin, int64_t end, const Body& body) {
  constexpr int kPack = S::kPack;
  const bool aligned = streams.phase() == 0;
#pragma unroll 1
  for (int64_t block = begin; block < end; block += kStepBlock) {
    const int n = static_cast<int>(min(end - block, static_cast<int64_t>(kStepBlock)));
    const int packed = aligned ? n / kPack * kPack : 0, at = static_cast<int>(threadIdx.x) * kPack;
    if (packed < n) __syncthreads();  // one by one: others compute what this thread encodes, and still read the last
    if (at < packed) body(block + at, std::integral_constant<int, kPack>());
#pragma unroll 1
    for (int i = packed + static_cast<int>(threadIdx.x); i < n; i += kThreads) {
      body(block + i, std::integral_constant<int, 1>());
    }
    if (packed < n) __syncthreads();
    encode_groups(streams, span, block, n);
  }
}

}  // namespace deepfast::cuda
