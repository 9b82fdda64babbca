// What the harness makes its cases of: random numbers, and memory that both a kernel and this program see.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../csrc/codec/half.h"
#include "../csrc/codec/int8.h"
#include "../csrc/cuda/kernels.h"
#include "../csrc/span.h"

namespace deepfast {

inline std::mt19937_64 random_bits;
inline std::string doing;  // for messages

inline int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }
inline bool chance(int percent) { return below(100) < percent; }
inline float uniform() { return static_cast<float>(below(1 << 24)) / (1 << 24) * 2 - 1; }

inline void require(bool right, const std::string& what) {
  if (right) return;
  std::fprintf(stderr, "%s: %s\n", doing.c_str(), what.c_str());
  std::exit(1);
}

constexpr int kDeviceFailed = 3;  // the exit code; no case is to blame, and nothing else can be asked of the device

inline void check_device(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: the device fails %s: %s\n", doing.c_str(), what, cudaGetErrorString(error));
  std::fflush(nullptr);
  std::_Exit(kDeviceFailed);  // no destructors: they would ask it to free memory
}

// After every launch: until then the memory is the device's.
inline void finish(const char* what) { check_device(cudaDeviceSynchronize(), what); }

inline void* allocate_managed(size_t bytes) {
  void* at = nullptr;
  check_device(cudaMallocManaged(&at, bytes + (bytes == 0)), "to give memory");
  return at;
}
inline void free_managed(void* at) { check_device(cudaFree(at), "to take memory back"); }

template <class T>
struct Managed {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(allocate_managed(n * sizeof(T))); }
  void deallocate(T* at, size_t) { free_managed(at); }
  bool operator==(const Managed&) const { return true; }
};
// Made with its length, it is just as long.
template <class T>
using Array = std::vector<T, Managed<T>>;

inline int64_t width_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : is_grouped(dtype) ? 1 : 2; }

// Some elements, `offset` elements (of groups: four times as many) after a boundary of 64 bytes.
struct Buffer {
  DType dtype;
  int64_t numel, width, offset, bytes;
  size_t lead;
  std::unique_ptr<char, decltype(&free_managed)> memory;

  Buffer(int64_t numel, DType dtype, int64_t offset)
      : dtype(dtype),
        numel(numel),
        width(width_of(dtype)),
        offset(offset),
        bytes(is_grouped(dtype) ? packed_bytes(numel) : numel * width),
        lead(is_grouped(dtype) ? 4 * offset : offset * width),
        memory(static_cast<char*>(allocate_managed(lead + bytes)), &free_managed) {}
  Buffer copy() const {
    Buffer other(numel, dtype, offset);
    std::memcpy(other.data(), data(), bytes);
    return other;
  }
  char* data() const { return memory.get() + lead; }
  bool is_nan(int64_t i) const {
    if (dtype == DType::kInt16 || dtype == DType::kUInt8) return false;
    if (dtype == DType::kInt8) {  // its sign
      auto* codes = reinterpret_cast<uint8_t*>(data());
      return i < numel && std::isnan(Int8<true>::of(words_of(codes, numel)[i / kGroup]).decode(codes[i]));
    }
    if (dtype == DType::kFloat32) return std::isnan(reinterpret_cast<const float*>(data())[i]);
    const uint16_t half = reinterpret_cast<const uint16_t*>(data())[i];
    return std::isnan(dtype == DType::kFloat16 ? Fp16::decode(half) : Bf16::decode(half));
  }
  // The first element that has other bits, or < 0. All NaNs are one: a GPU makes another than a CPU.
  int64_t differs_from(const Buffer& other) const {
    if (std::memcmp(data(), other.data(), bytes) == 0) return -1;
    for (int64_t i = 0; i < bytes / width; ++i) {
      const bool same = std::memcmp(data() + i * width, other.data() + i * width, width) == 0;
      if (!same && !(is_nan(i) && other.is_nan(i))) return i;
    }
    return -1;
  }
};

// What the numbers of a case are like.
struct Taste {
  int exponent = 0;       // decimal, of all
  int poison = 0;         // percent of spans that hold an inf or NaN somewhere
  bool any_bits = false;  // any bit pattern whatever
};

inline Taste any_taste() {
  Taste taste;
  taste.exponent = chance(70) ? static_cast<int>(below(5)) - 2 : static_cast<int>(below(60)) - 36;
  taste.poison = chance(20) ? 30 : 0;
  taste.any_bits = chance(5);
  return taste;
}

inline void fill(const Buffer& buffer, DType dtype, const Taste& taste, bool positive = false) {
  for (int64_t i = 0; i < buffer.numel; ++i) {
    float x = uniform() * std::pow(10.0f, static_cast<float>(taste.exponent));
    if (positive) x = std::fabs(x);
    if (chance(2)) x = chance(50) ? 0.0f : -0.0f;
    uint32_t bits = to_bits(x);
    if (taste.any_bits) bits = static_cast<uint32_t>(random_bits());
    if (dtype == DType::kFloat32) {
      std::memcpy(buffer.data() + 4 * i, &bits, 4);
    } else {
      uint16_t half = dtype == DType::kFloat16 ? Fp16::nearest_even(x) : Bf16::nearest_even(x);
      if (taste.any_bits) half = static_cast<uint16_t>(bits);
      std::memcpy(buffer.data() + 2 * i, &half, 2);
    }
  }
  if (taste.poison > 0 && buffer.numel > 0 && chance(taste.poison)) {
    const float inf = INFINITY, bad[] = {inf, -inf, NAN};
    const float x = bad[below(3)];
    const int64_t i = below(buffer.numel);
    const uint16_t half = dtype == DType::kFloat16 ? Fp16::nearest_even(x) : Bf16::nearest_even(x);
    std::memcpy(buffer.data() + buffer.width * i, dtype == DType::kFloat32 ? static_cast<const void*>(&x) : &half,
                buffer.width);
  }
}

inline DType any_dtype() { return static_cast<DType>(below(3)); }

inline int64_t any_numel(int64_t most) {
  switch (below(8)) {
    case 0:
      return 0;
    case 1:
      return 1;
    case 2:
      return below(8);
    case 3:
      return std::min<int64_t>(most, 1024 * (1 + below(3)) - 3 + below(7));
    case 4:
      return std::min<int64_t>(most, 4096 * (1 + below(2)) - 3 + below(7));
    default:
      return below(most + 1);
  }
}

inline std::vector<int64_t> any_numels(int64_t count, int64_t most) {
  std::vector<int64_t> numels(count);
  for (int64_t& numel : numels) numel = any_numel(most);
  return numels;
}

// Streams of a span begin at the same offset from an aligned element, or each at its own.
struct Offsets {
  const bool common = chance(60);
  const int64_t offset = chance(50) ? 0 : below(8);
  int64_t operator()() const { return common ? offset : below(8); }
};

// The largest count of something that still fits a launch's own parameters. bytes(count): of the table, 0 if it fits.
template <class Bytes>
int64_t most_that_fit(const Bytes& bytes) {
  int64_t fits = 0, too_many = 1;
  while (bytes(too_many) == 0) fits = too_many, too_many *= 2;
  while (too_many - fits > 1) {
    const int64_t middle = fits + (too_many - fits) / 2;
    (bytes(middle) == 0 ? fits : too_many) = middle;
  }
  return fits;
}

inline int64_t most_spans(int64_t groups) {
  const std::vector<cuda::Hyper> hyper(groups);
  return most_that_fit([&](int64_t count) {
    const std::vector<Span> spans(count);
    return cuda::step_needs({spans.data(), count, hyper.data(), groups}).table;
  });
}

inline int64_t most_groups() {
  const Span span = {};
  return most_that_fit([&](int64_t groups) {
    const std::vector<cuda::Hyper> hyper(groups);
    return cuda::step_needs({&span, 1, hyper.data(), groups}).table;
  });
}

}  // namespace deepfast
