// What a step reads and writes of a span: the one place that knows in which types it is kept.
//
// A pack is loaded raw and decoded when all that an update reads is under way; it is encoded, and stored raw.
#pragma once

#include <utility>

#include "int8.cuh"

namespace deepfast::cuda {

struct Any {};          // in the place of a type: the span says which, and it is looked at as the kernel runs
struct AnyOrGroups {};  // of moments, in 8 bits, too

// Elements of type T, float or Half.
template <class T>
struct Kept {
  template <int kSize>
  using Raw = Pack<T, kSize>;

  T* at;
  DType dtype;

  Kept() = default;
  __device__ Kept(void* at, DType dtype) : at(static_cast<T*>(at)), dtype(dtype) {}

  template <int kPack>
  __device__ int phase() const {
    return cuda::phase<kPack>(at);
  }
  template <int kSize>
  __device__ Raw<kSize> load(int64_t i) const {
    return cuda::load<kSize>(at + i);
  }
  template <int kSize>
  __device__ void store(int64_t i, const Raw<kSize>& raw) const {
    cuda::store<kSize>(at + i, raw);
  }
  template <int kSize>
  static __device__ Half half(const Raw<kSize>& raw, int j) {
    return static_cast<Half>(raw[j]);
  }
  template <int kSize>
  __device__ Pack<float, kSize> decode(const Raw<kSize>& raw) const {
    Pack<float, kSize> values;
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[j] = cuda::decode(raw[j], dtype);
    return values;
  }
  template <int kSize>
  __device__ Raw<kSize> encode(const Pack<float, kSize>& values) const {
    Raw<kSize> raw;
#pragma unroll
    for (int j = 0; j < kSize; ++j) raw[j] = stored<T>(values[j], dtype);
    return raw;
  }
};

// Four elements are 16 bytes or 8, in the same registers. Loads are not jumped around but predicated: what follows them
// is asked for at once, too.
template <>
struct Kept<Any> {
  template <int kSize>
  using Raw = Pack<uint32_t, kSize>;  // halves: two in a word

  char* at;
  DType dtype;

  Kept() = default;
  __device__ Kept(void* at, DType dtype) : at(static_cast<char*>(at)), dtype(dtype) {}

  __device__ bool wide() const { return dtype == DType::kFloat32; }
  __device__ uint32_t* words() const { return reinterpret_cast<uint32_t*>(at); }
  __device__ Half* halves() const { return reinterpret_cast<Half*>(at); }

  template <int kPack>
  __device__ int phase() const {
    return wide() ? cuda::phase<kPack>(words()) : cuda::phase<kPack>(halves());
  }
  template <int kSize>
  __device__ Raw<kSize> load(int64_t i) const {
    Raw<kSize> raw = {};
#if defined(__CUDA_ARCH__)
    if constexpr (kSize == 4) {
      asm volatile(
          "{\n\t"
          ".reg .pred wide;\n\t"
          "setp.ne.u32 wide, %5, 0;\n\t"
          "@wide ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t"
          "@!wide ld.global.v2.u32 {%0, %1}, [%4];\n\t"
          "}"
          : "+r"(raw[0]), "+r"(raw[1]), "+r"(raw[2]), "+r"(raw[3])
          : "l"(at + (wide() ? 4 * i : 2 * i)), "r"(uint32_t{wide()})
          : "memory");
      return raw;
    }
#endif
    if (wide()) return cuda::load<kSize>(words() + i);
    const auto pack = cuda::load<kSize>(halves() + i);
    std::memcpy(&raw, &pack, sizeof pack);
    return raw;
  }
  template <int kSize>
  __device__ void store(int64_t i, const Raw<kSize>& raw) const {
    if (wide()) return cuda::store<kSize>(words() + i, raw);
    Pack<Half, kSize> pack;
    std::memcpy(&pack, &raw, sizeof pack);
    cuda::store<kSize>(halves() + i, pack);
  }
  template <int kSize>
  static __device__ Half half(const Raw<kSize>& raw, int j) {
    return static_cast<Half>(raw[j / 2] >> j % 2 * 16);
  }
  template <int kSize>
  __device__ Pack<float, kSize> decode(const Raw<kSize>& raw) const {
    Pack<float, kSize> values;
    if (wide()) {
      std::memcpy(&values, &raw, sizeof values);
      return values;
    }
    const Kept<Half> narrow(at, dtype);
    Pack<Half, kSize> pack;
    std::memcpy(&pack, &raw, sizeof pack);
    return narrow.decode(pack);
  }
  template <int kSize>
  __device__ Raw<kSize> encode(const Pack<float, kSize>& values) const {
    Raw<kSize> raw = {};
    if (wide()) {
      std::memcpy(&raw, &values, sizeof raw);
      return raw;
    }
    const Kept<Half> narrow(at, dtype);
    const auto pack = narrow.encode(values);
    std::memcpy(&raw, &pack, sizeof pack);
    return raw;
  }
};

// Of a group's elements, as they lie in memory: raw[0] is four codes and raw[1] the word, or the one is a code with the
// word above it. New values are not stored but wait (int8.cuh): what one becomes depends on all of its group.
template <>
struct Kept<AnyOrGroups> : Kept<Any> {
  int64_t codes;  // before the words

  Kept() = default;
  __device__ Kept(void* at, DType dtype, int64_t numel) : Kept<Any>(at, dtype), codes(groups_of(numel) * kGroup) {}

  __device__ bool grouped() const { return is_grouped(dtype); }
  __device__ uint16_t* word(int64_t i) const { return reinterpret_cast<uint16_t*>(at + codes) + i / kGroup; }

  // A pack lies within a group. (That codes begin at a boundary of 4 bytes is checked where spans are made.)
  template <int kPack>
  __device__ int phase() const {
    return grouped() ? 0 : Kept<Any>::phase<kPack>();
  }
  template <int kSize>
  __device__ Raw<kSize> load(int64_t i) const {
    Raw<kSize> raw = {};
#if defined(__CUDA_ARCH__)
    if constexpr (kSize == 4) {
      const uint32_t shift = wide() ? 2 : grouped() ? 0 : 1;
      asm volatile(
          "{\n\t"
          ".reg .pred wide, half, grouped;\n\t"
          "setp.eq.u32 wide, %6, 2;\n\t"
          "setp.eq.u32 half, %6, 1;\n\t"
          "setp.eq.u32 grouped, %6, 0;\n\t"
          "@wide ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t"
          "@half ld.global.v2.u32 {%0, %1}, [%4];\n\t"
          "@grouped ld.global.u32 %0, [%4];\n\t"
          "@grouped ld.global.u16 %1, [%5];\n\t"
          "}"
          : "+r"(raw[0]), "+r"(raw[1]), "+r"(raw[2]), "+r"(raw[3])
          : "l"(at + (i << shift)), "l"(word(i)), "r"(shift)
          : "memory");
      return raw;
    }
#endif
    if (!grouped()) return Kept<Any>::load<kSize>(i);
    if constexpr (kSize == 4) {
      std::memcpy(&raw[0], at + i, 4);
      raw[1] = *word(i);
    } else {
      raw[0] = static_cast<uint8_t>(at[i]) | static_cast<uint32_t>(*word(i)) << 16;
    }
    return raw;
  }
  template <int kSize>
  __device__ Pack<float, kSize> decode(const Raw<kSize>& raw) const {
    if (!grouped()) return Kept<Any>::decode<kSize>(raw);
    const auto word = static_cast<uint16_t>(kSize == 4 ? raw[kSize / 4] : raw[0] >> 16);
    Pack<float, kSize> values;
    const auto each = [&](const auto form) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) values[j] = form.decode(static_cast<uint8_t>(raw[0] >> 8 * j));
    };
    dtype == DType::kInt8 ? each(Int8<true>::of(word)) : each(Int8<false>::of(word));
    return values;
  }
};

// How a weight is kept: in fp32; 16 bits and an fp32 master; 16 bits and what they lack of one; 16 bits alone.
enum class Weight { kWide, kMaster, kSplit, kHalf, kAny };

inline __device__ Weight weight_of(const Span& span) {
  if (span.param_dtype == DType::kFloat32) return Weight::kWide;
  return span.has_split() ? Weight::kSplit : span.master ? Weight::kMaster : Weight::kHalf;
}

// A span's streams. kWeight and AGrad (float, Half) are what is known of them when a kernel is compiled, and that the
// moments are in fp32; or kAny and Any, and whether some moments are in groups.
template <class ARule, Weight kWeight, class AGrad, bool kGroups = false>
struct Streams {
  using Rule = ARule;
  using Grad = AGrad;
  static constexpr bool kAny = kWeight == Weight::kAny;
  static constexpr bool kGrouped = kGroups;
  static constexpr bool kSplit = kWeight == Weight::kSplit;
  static constexpr bool kWide = kWeight == Weight::kWide || kWeight == Weight::kMaster;
  using Value = std::conditional_t<kAny, Any, std::conditional_t<kWide, float, Half>>;
  using Moment = std::conditional_t<kGrouped, AnyOrGroups, std::conditional_t<kAny, Any, float>>;
  static constexpr bool kHalfOnly = Rule::kMoments == 0 && std::is_same_v<Value, Half> && std::is_same_v<Grad, Half>;
  static constexpr int kPack = kHalfOnly ? 8 : 4;  // 16 bytes of the widest stream

  static constexpr int kSlots = Rule::kMoments > 0 ? Rule::kMoments : 1;

  Weight found;
  Kept<Value> weight;  // the fp32 master where there is one, else the parameter
  Half* half;          // the parameter where it is 16 bits wide
  Half* remainder;     // what it lacks of a split master
  Kept<Grad> grad;
  Kept<Moment> moment[kSlots];
  DType param_dtype;

  __device__ explicit Streams(const Span& span)
      : found(kAny ? weight_of(span) : kWeight),
        weight(form() == Weight::kMaster ? span.master : span.param,
               form() == Weight::kMaster ? DType::kFloat32 : span.param_dtype),
        half(static_cast<Half*>(span.param)),
        remainder(static_cast<Half*>(span.master)),
        grad(span.grad, span.grad_dtype),
        param_dtype(span.param_dtype) {
    for (int k = 0; k < Rule::kMoments; ++k) {
      if constexpr (kGrouped) {
        moment[k] = {span.moment[k], span.moment_dtype[k], span.numel};
      } else {
        moment[k] = {span.moment[k], span.moment_dtype[k]};
      }
    }
  }

  __device__ Weight form() const { return kAny ? found : kWeight; }
  __device__ float* wide() const { return reinterpret_cast<float*>(weight.at); }

  // As in for_each; -1 where the streams are never aligned together.
  __device__ int phase() const {
    const int common = weight.template phase<kPack>();
    bool same = grad.template phase<kPack>() == common;
    if (form() == Weight::kMaster) same &= cuda::phase<kPack>(half) == common;
    if (form() == Weight::kSplit) same &= cuda::phase<kPack>(remainder) == common;
    for (int k = 0; k < Rule::kMoments; ++k) same &= moment[k].template phase<kPack>() == common;
    return same ? common : -1;
  }
};

// What is loaded of kSize elements, as it lies in memory: all loads are under way before the first value is needed.
template <int kSize, bool kReadsGrad, class S>
struct Loaded {
  typename decltype(S::weight)::template Raw<kSize> weight;
  Pack<Half, kSize> remainder;
  typename decltype(S::grad)::template Raw<kSize> grad = {};
  typename Kept<typename S::Moment>::template Raw<kSize> moment[S::kSlots];

  __device__ Loaded(const S& streams, int64_t i) {
    weight = streams.weight.template load<kSize>(i);
    if (streams.form() == Weight::kSplit) remainder = load<kSize>(streams.remainder + i);
    if constexpr (kReadsGrad) grad = streams.grad.template load<kSize>(i);
    if constexpr (S::Rule::kMoments > 0) {
#pragma unroll
      for (int k = 0; k < S::Rule::kMoments; ++k) moment[k] = streams.moment[k].template load<kSize>(i);
    }
  }
};

// kSize elements in registers.
template <int kSize, class S>
struct Values {
  Pack<float, kSize> p, g, moment[S::kSlots];

  template <bool kReadsGrad>
  __device__ Values(const Loaded<kSize, kReadsGrad, S>& x, const S& streams, float multiplier) {
    if (streams.form() == Weight::kSplit) {
      with_half(streams.param_dtype, [&]<class, class Split>() {
#pragma unroll
        for (int j = 0; j < kSize; ++j) p[j] = Split::decode(decltype(S::weight)::half(x.weight, j), x.remainder[j]);
      });
    } else {
      p = streams.weight.decode(x.weight);
    }
    if constexpr (kReadsGrad) g = streams.grad.decode(x.grad);
#pragma unroll
    for (int j = 0; j < kSize; ++j) g[j] *= multiplier;
    if constexpr (S::Rule::kMoments > 0) {
#pragma unroll
      for (int k = 0; k < S::Rule::kMoments; ++k) moment[k] = streams.moment[k].decode(x.moment[k]);
    }
  }

  // Calls formula(j, p, g, moment...) on each.
  template <class Formula>
  __device__ void each(const Formula& formula) {
    [&]<size_t... K>(std::index_sequence<K...>) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) formula(j, p.value[j], g.value[j], moment[K].value[j]...);
    }(std::make_index_sequence<S::Rule::kMoments>());
  }

  // Leaves here what is then there: a moment may be rounded. One in groups waits to be encoded.
  __device__ void store_moments(const S& streams, int64_t i) {
    if constexpr (S::Rule::kMoments > 0) {
#pragma unroll
      for (int k = 0; k < S::Rule::kMoments; ++k) {
        if constexpr (S::kGrouped) {
          if (streams.moment[k].grouped()) {
            waiting<S::Rule::kMoments>().put(k, i, moment[k]);
            continue;
          }
        }
        const auto raw = streams.moment[k].encode(moment[k]);
        streams.moment[k].template store<kSize>(i, raw);
        moment[k] = streams.moment[k].decode(raw);
      }
    }
  }
};

// call.template operator()<S>() with the streams' types; kAny: with none.
template <class Rule, bool kAny, class Call>
__device__ void with_streams(const Span& span, const Call& call) {
  if constexpr (kAny) {
    if constexpr (Rule::kMoments > 0) {
      if (has_groups(span, Rule::kMoments)) return call.template operator()<Streams<Rule, Weight::kAny, Any, true>>();
    }
    call.template operator()<Streams<Rule, Weight::kAny, Any>>();
  } else {
    const auto with_grad = [&]<Weight kWeight>() {
      if (span.grad_dtype != DType::kFloat32) {
        call.template operator()<Streams<Rule, kWeight, Half>>();
      } else {
        call.template operator()<Streams<Rule, kWeight, float>>();
      }
    };
    switch (weight_of(span)) {
      case Weight::kWide:
        return with_grad.template operator()<Weight::kWide>();
      case Weight::kMaster:
        return with_grad.template operator()<Weight::kMaster>();
      case Weight::kSplit:
        return with_grad.template operator()<Weight::kSplit>();
      default:
        return with_grad.template operator()<Weight::kHalf>();
    }
  }
}

}  // namespace deepfast::cuda
