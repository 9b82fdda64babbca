// The CPU backend as operators and plans see it.
#pragma once

#include <ATen/EmptyTensor.h>  // at::empty's header takes a tenth of the time that all of ops.cpp takes

#include <cstring>

#include "../cpu/kernels.h"
#include "tensors.h"

namespace deepfast::bindings {

class Cpu {
 public:
  static constexpr at::DeviceType kDevice = at::kCPU;

  explicit Cpu(at::Device) {}

  Tensor statistics(const Spans& spans) {
    Tensor out(at::detail::empty_cpu({2}, at::kDouble));
    const Statistics found = cpu::statistics(spans.data(), spans.size());
    std::memcpy(out.mutable_data_ptr(), &found, sizeof found);
    return out;
  }

  void decide(const Tensor& record, const Spans& spans, const Question& question) {
    decide_from(record, cpu::statistics(spans.data(), spans.size()), question);
  }

  void decide(const Tensor& record, const double* statistics, const Question& question) {
    Statistics known = {};
    if (statistics) std::memcpy(&known, statistics, sizeof known);
    decide_from(record, known, question);
  }

  Tensor norms(int rule, const Spans& spans, const Hypers& hypers, const Tensor& record) {
    Tensor out(at::detail::empty_cpu({static_cast<int64_t>(spans.size()), 2}, at::kDouble));
    const Tensor table = filled(hypers);
    cpu::norms(rule, spans.data(), spans.size(), table.const_data_ptr<double>(), table.size(1), read(record),
               static_cast<Norms*>(out.mutable_data_ptr()));
    return out;
  }

  Tensor norms_of_blocks(int rule, const Spans& spans, const Hypers& hypers, const Tensor& record) {
    int64_t blocks = 0;
    for (const Span& span : spans) blocks += (span.numel + kStepBlock - 1) / kStepBlock;
    Tensor out(at::detail::empty_cpu({blocks, 2}, at::kDouble));
    const Tensor table = filled(hypers);
    cpu::norms_of_blocks(rule, spans.data(), spans.size(), table.const_data_ptr<double>(), table.size(1), read(record),
                         static_cast<Norms*>(out.mutable_data_ptr()));
    return out;
  }

  void step(int rule, const Spans& spans, const Hypers& hypers, const Tensor& record, const double* norms,
            Afterwards after, const std::vector<int64_t>& sinks) {
    const Tensor table = filled(hypers);
    cpu::step(rule, spans.data(), spans.size(), table.const_data_ptr<double>(), table.size(1), read(record),
              reinterpret_cast<const Norms*>(norms), after, {sinks.data(), static_cast<int64_t>(sinks.size())});
  }

  void refresh(const Spans& spans) { cpu::refresh(spans.data(), spans.size()); }

  void accumulate(const Spans& spans, float weight, bool overwrite) {
    cpu::accumulate(spans.data(), spans.size(), weight, overwrite);
  }

  void scaler_update(float* state, TensorList found_inf, const ScalerOptions& options) {
    bool overflow = false;
    for (const Tensor& found : found_inf) overflow |= found.item<float>() > 0.0f;
    ScalerState now;
    std::memcpy(&now, state, sizeof now);
    now = transition(now, overflow, options);
    std::memcpy(state, &now, sizeof now);
  }

 private:
  static float scalar_or(const std::optional<Tensor>& t, float otherwise) {
    return t.has_value() ? t->item<float>() : otherwise;
  }

  static void decide_from(const Tensor& record, const Statistics& statistics, const Question& question) {
    const StepRecord decided =
        deepfast::decide(statistics, scalar_or(question.grad_scale, 1.0f), scalar_or(question.found_inf, 0.0f),
                         static_cast<float>(question.max_norm), question.check);
    std::memcpy(record.mutable_data_ptr(), &decided, sizeof decided);
  }

  static StepRecord read(const Tensor& record) {
    StepRecord decided;
    std::memcpy(&decided, record.const_data_ptr(), sizeof decided);
    return decided;
  }

  static Tensor filled(const Hypers& hypers) {
    if (hypers.lrs.empty()) return hypers.table;
    Tensor table = hypers.table.clone();
    double* values = table.mutable_data_ptr<double>();
    for (int64_t group = 0; group < table.size(0); ++group) {
      if (const auto lr = hypers.lr(group)) values[group * table.size(1) + 1] = lr->item<double>();
    }
    return table;
  }
};

}  // namespace deepfast::bindings
