// The CUDA backend as operators and plans see it. No header of CUDA's or of torch's CUDA build is needed here.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <vector>

#include "../cuda/kernels.h"
#include "tensors.h"

// Of torch's C interface for compiled models (torch/csrc/inductor/aoti_torch/c/shim.h), where it is declared only if
// torch's CUDA headers are there.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace deepfast::bindings {

inline void* current_stream(at::Device device) {
  void* current = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &current) == 0, "deepfast: ", device,
              " has no current stream");
  return current;
}

// kType: at::kCUDA; or at::kCPU in tests, where the kernels run on the host.
template <at::DeviceType kType>
class CudaOn {
 public:
  static constexpr at::DeviceType kDevice = kType;

  explicit CudaOn(at::Device device) : device_(device) {}

  Tensor statistics(const Spans& spans) {
    Tensor out = at::empty({2}, on_device(at::kDouble));
    statistics(spans, static_cast<Statistics*>(out.mutable_data_ptr()), nullptr, {});
    return out;
  }

  void decide(const Tensor& record, const Spans& spans, const Question& question) {
    statistics(spans, nullptr, static_cast<StepRecord*>(record.mutable_data_ptr()), pointers(question));
  }

  void decide(const Tensor& record, const double* statistics, const Question& question) {
    const c10::DeviceGuard guard(device_);
    cuda::decide(static_cast<StepRecord*>(record.mutable_data_ptr()), reinterpret_cast<const Statistics*>(statistics),
                 pointers(question), stream());
  }

  Tensor norms(int rule, const Spans& spans, const Hypers& hypers, const Tensor& record) {
    const c10::DeviceGuard guard(device_);
    const std::vector<cuda::Hyper> rows = rows_of(hypers);
    const cuda::Job job = job_of(spans, rows);
    // An empty span is never visited; over several ranks its zeros are added to others.
    const bool empty = std::any_of(spans.begin(), spans.end(), [](const Span& span) { return span.numel == 0; });
    const int64_t count = spans.size();
    Tensor out = empty ? at::zeros({count, 2}, on_device(at::kDouble)) : at::empty({count, 2}, on_device(at::kDouble));
    Memory fresh;
    const cuda::Workspace workspace = workspace_in(norms_, fresh, cuda::norms_needs(job));
    cuda::norms(rule, job, workspace, decided(record), static_cast<Norms*>(out.mutable_data_ptr()), stream());
    return out;
  }

  void step(int rule, const Spans& spans, const Hypers& hypers, const Tensor& record, const double* norms,
            Afterwards after, const std::vector<int64_t>& sinks) {
    const c10::DeviceGuard guard(device_);
    const std::vector<cuda::Hyper> rows = rows_of(hypers);
    const cuda::Job job = job_of(spans, rows);
    Memory fresh;
    const cuda::Workspace workspace = workspace_in(step_, fresh, cuda::step_needs(job));
    cuda::step(rule, job, workspace, decided(record), reinterpret_cast<const Norms*>(norms), after,
               {sinks.data(), static_cast<int64_t>(sinks.size())}, stream());
  }

  void refresh(const Spans& spans) {
    const c10::DeviceGuard guard(device_);
    const cuda::Job job = job_of(spans, {});
    Memory fresh;
    cuda::refresh(job, workspace_in(fresh, fresh, cuda::refresh_needs(job)), stream());
  }

  void accumulate(const Spans& spans, float weight, bool overwrite) {
    const c10::DeviceGuard guard(device_);
    const cuda::Job job = job_of(spans, {});
    Memory fresh;
    cuda::accumulate(job, workspace_in(fresh, fresh, cuda::accumulate_needs(job)), weight, overwrite, stream());
  }

  void scaler_update(float* state, TensorList found_inf, const ScalerOptions& options) {
    const c10::DeviceGuard guard(device_);
    std::vector<const float*> found;
    for (const Tensor& f : found_inf) found.push_back(f.const_data_ptr<float>());
    const int64_t count = found.size();
    const Tensor table = at::empty({cuda::scaler_table_bytes(count)}, on_device(at::kByte));
    cuda::scaler_update(reinterpret_cast<ScalerState*>(state), found.data(), count,
                        static_cast<char*>(table.mutable_data_ptr()), options, stream());
  }

 private:
  // What a kind of launch keeps from step to step. It was allocated on `stream`, and is good for launches there.
  struct Memory {
    void* stream = nullptr;
    Tensor partial, counters, table;
    std::vector<char> sent;
  };

  at::TensorOptions on_device(at::ScalarType dtype) const { return at::TensorOptions().device(device_).dtype(dtype); }

  void* stream() const { return current_stream(device_); }

  // Memory for a launch: `kept`, enlarged where need be. A launch that goes into a graph has `fresh` memory, which
  // belongs to the graph's pool: it runs again when `kept` may be gone or hold another table.
  cuda::Workspace workspace_in(Memory& kept, Memory& fresh, const cuda::Needs& needs) {
    void* const current = stream();
    const bool capturing = cuda::is_capturing(current);
    Memory& memory = capturing ? fresh : kept;
    if (memory.stream != current) memory = Memory{current, {}, {}, {}, {}};
    const auto enlarge = [&](Tensor& t, int64_t numel, at::ScalarType dtype, bool zeroed) {
      if (numel == 0 || (t.defined() && t.numel() >= numel)) return false;
      t = zeroed ? at::zeros({numel}, on_device(dtype)) : at::empty({numel}, on_device(dtype));
      return true;
    };
    enlarge(memory.partial, needs.partial, at::kByte, false);
    enlarge(memory.counters, needs.counters, at::kInt, true);
    if (enlarge(memory.table, needs.table, at::kByte, false)) memory.sent.clear();
    const bool known = memory.sent.size() >= static_cast<size_t>(needs.table);
    if (!known) memory.sent.assign(needs.table, static_cast<char>(cuda::kUnknown));
    const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
    return {data(memory.partial), static_cast<uint32_t*>(data(memory.counters)), static_cast<char*>(data(memory.table)),
            capturing ? nullptr : memory.sent.data()};
  }

  void statistics(const Spans& spans, Statistics* out, StepRecord* record, const cuda::Question& question) {
    const c10::DeviceGuard guard(device_);
    const cuda::Job job = job_of(spans, {});
    Memory fresh;
    const cuda::Workspace workspace = workspace_in(statistics_, fresh, cuda::statistics_needs(job));
    cuda::statistics(job, workspace, out, record, question, stream());
  }

  static cuda::Job job_of(const Spans& spans, const std::vector<cuda::Hyper>& rows) {
    return {spans.data(), static_cast<int64_t>(spans.size()), rows.data(), static_cast<int64_t>(rows.size())};
  }

  static std::vector<cuda::Hyper> rows_of(const Hypers& hypers) {
    const int64_t groups = hypers.table.size(0), values = hypers.table.size(1);
    const double* table = hypers.table.const_data_ptr<double>();
    std::vector<cuda::Hyper> rows(groups);
    for (int64_t group = 0; group < groups; ++group) {
      std::copy(table + group * values, table + (group + 1) * values, rows[group].values);
      if (const auto lr = hypers.lr(group)) {
        rows[group].lr = lr->const_data_ptr();
        rows[group].lr_is_fp64 = lr->scalar_type() == at::kDouble;
      }
    }
    return rows;
  }

  static cuda::Question pointers(const Question& question) {
    const auto data = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; };
    return {data(question.grad_scale), data(question.found_inf), static_cast<float>(question.max_norm), question.check};
  }

  static const StepRecord* decided(const Tensor& record) {
    return static_cast<const StepRecord*>(record.const_data_ptr());
  }

  at::Device device_;
  Memory statistics_, norms_, step_;
};

using Cuda = CudaOn<at::kCUDA>;

}  // namespace deepfast::bindings
