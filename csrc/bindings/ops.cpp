// torch.ops.deepfast.* and torch.classes.deepfast.*: schemas, checks, and tensors turned into spans.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <string>
#include <vector>

#include "plan.h"

namespace deepfast::bindings {
namespace {

Tensor statistics(TensorList grads) {
  ElementOrder order;
  std::vector<Span> spans(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    order.follow(grads[i]);
    spans[i].grad = order.read(grads[i], "a gradient");
    spans[i].grad_dtype = dtype_of(grads[i], "a gradient");
    spans[i].numel = grads[i].numel();
  }
  return to_tensor(cpu::statistics(spans.data(), spans.size()));
}

float scalar_or(const std::optional<Tensor>& t, float otherwise) {
  return t.has_value() ? t->item<float>() : otherwise;
}

void decide(const Tensor& record, const std::optional<Tensor>& statistics, const std::optional<Tensor>& grad_scale,
            const std::optional<Tensor>& found_inf, double max_norm, bool check) {
  TORCH_CHECK(statistics.has_value() || (max_norm == 0.0 && !check),
              "deepfast: clipping and the check for non-finite gradients need the statistics");
  Statistics known = {0.0, 0.0};
  if (statistics.has_value()) {
    TORCH_CHECK(statistics->scalar_type() == at::kDouble && statistics->numel() == 2 && statistics->is_contiguous(),
                "deepfast: statistics must be 2 float64 values");
    const double* values = statistics->const_data_ptr<double>();
    known = {values[0], values[1]};
  }
  const StepRecord decided = deepfast::decide(known, scalar_or(grad_scale, 1.0f), scalar_or(found_inf, 0.0f),
                                              static_cast<float>(max_norm), check);
  std::memcpy(fp32_values(record, 3, "the record"), &decided, sizeof decided);
  written(record);
}

void step(const std::string& rule, TensorList params, TensorList grads, TensorList masters, TensorList moments,
          TensorList steps, const Tensor& hyper, const Tensor& groups, const Tensor& record, bool reset_grad) {
  Plan plan(rule, params, masters, moments, steps, groups);
  check_count(grads.size(), params.size(), "gradients");
  Plan::Gradients given;
  for (const Tensor& grad : grads) {
    dtype_of(grad, "a gradient");
    given.push_back(grad);
  }
  TORCH_CHECK(plan.gather(given, reset_grad) != Plan::kStale,
              "deepfast: parameters and gradients must be dense CPU tensors");
  std::optional<Tensor> norms;
  if (plan.needs_norms()) norms = plan.norms(hyper, record);
  plan.step(hyper, record, norms);
}

void accumulate(TensorList sums, TensorList grads, double weight, bool overwrite) {
  check_count(grads.size(), sums.size(), "gradients");
  ElementOrder order;
  std::vector<Span> spans(sums.size());
  for (size_t i = 0; i < sums.size(); ++i) {
    order.follow(sums[i]);
    TORCH_CHECK(sums[i].scalar_type() == at::kFloat, "deepfast: a sum has dtype ", sums[i].scalar_type());
    spans[i].param = order.write(sums[i], "a sum");
    spans[i].grad = order.read(grads[i], "a gradient");
    spans[i].grad_dtype = dtype_of(grads[i], "a gradient");
    spans[i].numel = sums[i].numel();
  }
  cpu::accumulate(spans.data(), spans.size(), static_cast<float>(weight), overwrite);
  order.write_back();
  for (const Tensor& t : sums) written(t);
}

void scaler_update(const Tensor& state, TensorList found_inf, double growth_factor, double backoff_factor,
                   int64_t growth_interval, int64_t hysteresis, bool consecutive_hysteresis, bool dynamic,
                   double min_scale, double max_scale) {
  bool overflow = false;
  for (const Tensor& found : found_inf) overflow |= found.item<float>() > 0.0f;
  float* values = fp32_values(state, 4, "the scaler's state");
  ScalerState now;
  std::memcpy(&now, values, sizeof now);
  now = transition(now, overflow,
                   {growth_factor, backoff_factor, growth_interval, hysteresis, consecutive_hysteresis, dynamic,
                    min_scale, max_scale});
  std::memcpy(values, &now, sizeof now);
  written(state);
}

}  // namespace
}  // namespace deepfast::bindings

TORCH_LIBRARY(deepfast, library) {
  using deepfast::bindings::Plan;
  using Tensors = std::vector<at::Tensor>;
  library.class_<Plan>("Plan")
      .def(torch::init(
          [](std::string rule, Tensors params, Tensors masters, Tensors moments, Tensors steps, at::Tensor groups) {
            return c10::make_intrusive<Plan>(std::move(rule), params, masters, moments, steps, groups);
          }))
      .def("needs_norms", &Plan::needs_norms)
      .def("gather", &Plan::gather)
      .def("statistics", &Plan::statistics)
      .def("norms", &Plan::norms)
      .def("step", &Plan::step)
      .def("marks", &Plan::marks);
  library.def("statistics(Tensor[] grads) -> Tensor");
  library.def(
      "decide_(Tensor(a!) record, Tensor? statistics, Tensor? grad_scale, Tensor? found_inf, float max_norm, "
      "bool check) -> ()");
  library.def(
      "step_(str rule, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] masters, Tensor(d!)[] moments, "
      "Tensor(e!)[] steps, Tensor hyper, Tensor groups, Tensor record, bool reset_grad) -> ()");
  library.def("accumulate_(Tensor(a!)[] sums, Tensor[] grads, float weight, bool overwrite) -> ()");
  library.def(
      "scaler_update_(Tensor(a!) state, Tensor[] found_inf, float growth_factor, float backoff_factor, "
      "int growth_interval, int hysteresis, bool consecutive_hysteresis, bool dynamic, float min_scale, "
      "float max_scale) -> ()");
}

TORCH_LIBRARY_IMPL(deepfast, CPU, library) {
  namespace bindings = deepfast::bindings;
  library.impl("statistics", &bindings::statistics);
  library.impl("decide_", &bindings::decide);
  library.impl("step_", &bindings::step);
  library.impl("accumulate_", &bindings::accumulate);
  library.impl("scaler_update_", &bindings::scaler_update);
}
