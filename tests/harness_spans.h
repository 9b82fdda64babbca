// Lists of spans for the CUDA kernels and the CPU's: random in all that a span says.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../csrc/codec/split.h"
#include "../csrc/math/rules.h"
#include "harness.h"

namespace deepfast {

// The same spans twice: for the CPU, and for the device that is played.
struct Twins {
  std::vector<Buffer> cpu, cuda;
  std::vector<Span> on_cpu, on_cuda;
  std::vector<std::string> names;

  // One buffer a side; the span's pointer to it on each.
  template <class Pointer>
  void add(Buffer buffer, Pointer Span::* field, Span& a, Span& b, const char* name) {
    set(a.*field, b.*field, std::move(buffer), name);
  }
  template <class Pointer>
  void set(Pointer& a, Pointer& b, Buffer buffer, const char* name) {
    cuda.push_back(buffer.copy());
    cpu.push_back(std::move(buffer));
    a = reinterpret_cast<Pointer>(cpu.back().data());
    b = reinterpret_cast<Pointer>(cuda.back().data());
    names.push_back(std::string(name) + " of span " + std::to_string(on_cpu.size()));
  }
  void compare(const char* when) const {
    for (size_t i = 0; i < cpu.size(); ++i) {
      const int64_t at = cpu[i].differs_from(cuda[i]);
      if (at < 0) continue;
      require(false, names[i] + " differs " + when + " from element " + std::to_string(at) + " of " +
                         std::to_string(cpu[i].numel) + " on");
    }
  }
};

// How a case's spans are kept, besides in fp32 and 16 bits with an fp32 master.
struct Forms {
  bool split = chance(60), narrow = chance(50), grouped = chance(40), by_chance = chance(40),
       counted = by_chance || chance(20);
};

// A weight and the remainder that belongs to it, or one that does not.
inline void fill_split(const Buffer& weight, const Buffer& remainder, const Taste& taste) {
  const Buffer wide(weight.numel, DType::kFloat32, 0);
  fill(wide, DType::kFloat32, taste);
  for (int64_t i = 0; i < weight.numel; ++i) {
    const bool fp16 = weight.dtype == DType::kFloat16;
    const float x = reinterpret_cast<const float*>(wide.data())[i];
    uint16_t half = fp16 ? Fp16::from_master(x) : Bf16::from_master(x);
    int16_t lacks = fp16 ? SplitFp16::remainder(x, half) : SplitBf16::remainder(x, half);
    const bool finite = std::isfinite(fp16 ? Fp16::decode(half) : Bf16::decode(half));
    if (finite && chance(5)) lacks = static_cast<int16_t>(random_bits());
    std::memcpy(weight.data() + 2 * i, &half, 2);
    std::memcpy(remainder.data() + 2 * i, &lacks, 2);
  }
}

// Moments in groups: what somebody has encoded, or any codes under such words.
template <bool kSigned>
void fill_groups(const Buffer& buffer, const Taste& taste, bool positive) {
  const Buffer wide(buffer.numel, DType::kFloat32, 0);
  fill(wide, DType::kFloat32, taste, positive);
  const auto* values = reinterpret_cast<const float*>(wide.data());
  auto* codes = reinterpret_cast<uint8_t*>(buffer.data());
  std::memset(codes, 0, buffer.bytes);
  const bool any_codes = chance(20);
  for (int64_t group = 0; group < groups_of(buffer.numel); ++group) {
    const int64_t begin = group * kGroup, end = std::min(begin + kGroup, buffer.numel);
    uint32_t greatest = 0, negated = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t size = to_bits(magnitude(values[i]));
      greatest = std::max(greatest, size);
      negated = std::max(negated, 0u - size);
    }
    const uint16_t word = Int8<kSigned>::word_of(greatest, negated);
    words_of(codes, buffer.numel)[group] = word;
    for (int64_t i = begin; i < end; ++i) {
      const auto bits = static_cast<uint32_t>(random_bits());
      codes[i] = any_codes ? static_cast<uint8_t>(bits) : Int8<kSigned>::of(word).encode(values[i], bits);
    }
  }
}

inline void add_span(Twins& twins, int rule, int64_t numel, const Taste& taste, const Forms& forms, int64_t groups) {
  Span a = {}, b = {};
  const Offsets offset;
  a.numel = numel;
  a.param_dtype = any_dtype();
  a.grad_dtype = chance(70) ? a.param_dtype : any_dtype();
  a.group = static_cast<int32_t>(below(groups));
  const bool has_master = a.param_dtype != DType::kFloat32 && chance(70);
  if (has_master && forms.split && chance(60)) a.master_dtype = DType::kInt16;
  bool grouped = false;
  for (int k = 0; k < kRules[rule].moments; ++k) {
    DType& dtype = a.moment_dtype[k];
    dtype = forms.narrow && chance(60) ? any_dtype() : DType::kFloat32;
    if (forms.grouped && chance(60)) dtype = chance(50) ? DType::kInt8 : DType::kUInt8;
    grouped |= is_grouped(dtype);
  }
  if (forms.by_chance && chance(70)) {
    a.rounding = Rounding::kStochastic;
  }
  if (a.rounding == Rounding::kStochastic || grouped) {
    a.seed = random_bits();
    a.first = below(int64_t{3} << (chance(50) ? 10 : 32));
    if (grouped) a.first -= a.first % kGroup;
  }
  b = a;
  const auto stream = [&](auto Span::* field, DType dtype, const char* name) {
    Buffer buffer(numel, dtype, offset());
    fill(buffer, dtype, taste);
    twins.add(std::move(buffer), field, a, b, name);
  };
  if (a.master_dtype == DType::kInt16) {
    Buffer weight(numel, a.param_dtype, offset()), remainder(numel, DType::kInt16, offset());
    fill_split(weight, remainder, taste);
    twins.add(std::move(weight), &Span::param, a, b, "param");
    twins.add(std::move(remainder), &Span::master, a, b, "the remainder");
  } else {
    stream(&Span::param, a.param_dtype, "param");
    if (has_master) stream(&Span::master, DType::kFloat32, "master");
  }
  stream(&Span::grad, a.grad_dtype, "grad");
  for (int k = 0; k < kRules[rule].moments; ++k) {
    Buffer buffer(numel, a.moment_dtype[k], offset());
    const bool positive = k > 0 || kRules[rule].moments == 1;
    switch (a.moment_dtype[k]) {
      case DType::kInt8:
        fill_groups<true>(buffer, taste, positive);
        break;
      case DType::kUInt8:
        fill_groups<false>(buffer, taste, positive);
        break;
      default:
        fill(buffer, a.moment_dtype[k], taste, positive);
    }
    twins.set(a.moment[k], b.moment[k], std::move(buffer), "a moment");
  }
  if (kRules[rule].counts_steps || grouped || (forms.counted && chance(70))) {
    Buffer step(1, DType::kFloat32, 0);
    const float count = chance(30) ? 0.0f : chance(5) ? 0x1p24f : static_cast<float>(below(100000));
    std::memcpy(step.data(), &count, 4);
    twins.add(std::move(step), &Span::step, a, b, "the step count");
  }
  twins.on_cpu.push_back(a);
  twins.on_cuda.push_back(b);
}

// A place for the only span's new weights, and how many bytes after the old ones it is: on the CPU, and on the device.
inline void further_on(Twins& twins, int64_t (&bytes)[2]) {
  const Span &a = twins.on_cpu[0], &b = twins.on_cuda[0];
  const int64_t offset = reinterpret_cast<uintptr_t>(a.param) % 64 / width_of(a.param_dtype);
  Buffer other(a.numel, a.param_dtype, offset);
  std::memset(other.data(), 0, a.numel * other.width);
  char *on_cpu, *on_cuda;
  twins.set(on_cpu, on_cuda, std::move(other), "another rank's weight");
  bytes[0] = on_cpu - static_cast<char*>(a.param);
  bytes[1] = on_cuda - static_cast<char*>(b.param);
}

// Whether moments are kept in 16 bits or 8; and whether there is anything else that the faster kernel does not ask.
inline bool narrow_moments(int rule, const std::vector<Span>& spans) {
  for (const Span& span : spans) {
    for (int k = 0; k < kRules[rule].moments; ++k) {
      if (span.moment_dtype[k] != DType::kFloat32) return true;
    }
  }
  return false;
}
inline bool needs_asking(int rule, const std::vector<Span>& spans) {
  for (const Span& span : spans) {
    if (span.rounding == Rounding::kStochastic || (span.step && !kRules[rule].counts_steps)) return true;
  }
  return narrow_moments(rule, spans);
}

}  // namespace deepfast
