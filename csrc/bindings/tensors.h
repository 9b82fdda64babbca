// What every operator asks of its tensors.
#pragma once

#include <torch/library.h>

#include <optional>
#include <vector>

#include "../codec/int8.h"
#include "../math/record.h"
#include "../span.h"

namespace deepfast::bindings {

using at::Tensor;
using at::TensorList;
using Spans = std::vector<Span>;
using OptionalTensors = c10::List<std::optional<Tensor>>;

inline std::optional<DType> kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

inline DType dtype_of(const Tensor& t, const char* what) {
  const std::optional<DType> dtype = kernel_dtype(t.scalar_type());
  TORCH_CHECK(dtype, "deepfast: ", what, " has dtype ", t.scalar_type(), "; the kernels take float32, float16 and ",
              "bfloat16 (others run on backend=\"reference\")");
  return *dtype;
}

// fp32, or of a 16-bit parameter what it lacks of that (csrc/codec/split.h).
inline DType master_dtype(const Tensor& t, DType param) {
  if (t.scalar_type() == at::kShort && param != DType::kFloat32) return DType::kInt16;
  TORCH_CHECK(t.scalar_type() == at::kFloat, "deepfast: a master has dtype ", t.scalar_type());
  return DType::kFloat32;
}

// A moment's: any of the kernels', or (int8, uint8) in groups of 8 bits (csrc/codec/int8.h).
inline DType moment_dtype(const Tensor& t) {
  if (t.scalar_type() == at::kChar) return DType::kInt8;
  return t.scalar_type() == at::kByte ? DType::kUInt8 : dtype_of(t, "a moment");
}

inline void check_count(size_t got, size_t count, const char* what) {
  TORCH_CHECK(got == count, "deepfast: ", count, " tensors of ", what, " expected, got ", got);
}

inline void check_device(const Tensor& t, at::Device device, const char* what) {
  TORCH_CHECK(t.device() == device, "deepfast: ", what, " lies on ", t.device(), ", not on ", device);
}

inline float* fp32_values(const Tensor& t, int64_t numel, const char* what, at::Device device) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.numel() == numel && t.is_contiguous(), "deepfast: ", what, " must be ",
              numel, " contiguous float32 values, got ", t.numel(), " of ", t.scalar_type());
  check_device(t, device, what);
  return t.mutable_data_ptr<float>();
}

inline double* fp64_values(const Tensor& t, int64_t numel, const char* what, at::Device device) {
  TORCH_CHECK(t.scalar_type() == at::kDouble && t.numel() == numel && t.is_contiguous(), "deepfast: ", what,
              " must be ", numel, " contiguous float64 values, got ", t.numel(), " of ", t.scalar_type());
  check_device(t, device, what);
  return t.mutable_data_ptr<double>();
}

// A moment in groups, of a parameter of `numel` elements.
inline void* grouped_values(const Tensor& t, int64_t numel, at::Device device) {
  TORCH_CHECK(t.dim() == 1 && t.numel() == packed_bytes(numel) && t.is_contiguous(), "deepfast: a moment in 8 bits of ",
              numel, " elements must be ", packed_bytes(numel), " contiguous bytes, got shape ", t.sizes());
  check_device(t, device, "a moment");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 4 == 0,
              "deepfast: a moment in 8 bits must begin at a boundary of 4 bytes");
  return t.mutable_data_ptr();
}

// Autograd must know what was written behind its back: a graph that still needs the old values has to refuse.
inline void written(at::TensorImpl& t) {
  if (!t.is_inference()) t.bump_version();
}
inline void written(const Tensor& t) { written(*t.unsafeGetTensorImpl()); }

// What `decide` is asked (csrc/math/record.h).
struct Question {
  const std::optional<Tensor>& grad_scale;
  const std::optional<Tensor>& found_inf;
  double max_norm;
  bool check;
};

inline void check_question(const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                           at::Device device) {
  if (grad_scale) fp32_values(*grad_scale, 1, "grad_scale", device);
  if (found_inf) fp32_values(*found_inf, 1, "found_inf", device);
}

// One row a group, and the learning rates that are tensors (or none).
struct Hypers {
  const Tensor& table;  // fp64 [groups, values] on the CPU, checked
  const OptionalTensors& lrs;

  std::optional<Tensor> lr(int64_t group) const {
    return lrs.empty() ? std::nullopt : std::optional<Tensor>(lrs.get(group));
  }
};

}  // namespace deepfast::bindings
