// The operators on any backend: schemas, checks, and tensors turned into spans.
#pragma once

#include <string>

#include "plan.h"

namespace deepfast::bindings {

constexpr const char* kSchemas[] = {
    "statistics(Tensor[] grads) -> Tensor",
    "decide_(Tensor(a!) record, Tensor? statistics, Tensor? grad_scale, Tensor? found_inf, float max_norm, "
    "bool check) -> ()",
    "step_(str rule, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] masters, Tensor(d!)[] moments, "
    "Tensor(e!)[] steps, Tensor hyper, Tensor groups, Tensor record, bool reset_grad) -> ()",
    "accumulate_(Tensor(a!)[] sums, Tensor[] grads, float weight, bool overwrite) -> ()",
    "scaler_update_(Tensor(a!) state, Tensor[] found_inf, float growth_factor, float backoff_factor, "
    "int growth_interval, int hysteresis, bool consecutive_hysteresis, bool dynamic, float min_scale, "
    "float max_scale) -> ()",
};

template <class Backend>
struct Operators {
  static Tensor statistics(TensorList grads) {
    const at::Device device = grads[0].device();  // there is one: else no backend would have been chosen
    ElementOrder order(device);
    Spans spans(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      order.follow(grads[i]);
      spans[i].grad = order.read(grads[i], "a gradient");
      spans[i].grad_dtype = dtype_of(grads[i], "a gradient");
      spans[i].numel = grads[i].numel();
    }
    return Backend(device).statistics(spans);
  }

  static void decide(const Tensor& record, const std::optional<Tensor>& statistics,
                     const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, double max_norm,
                     bool check) {
    TORCH_CHECK(statistics.has_value() || (max_norm == 0.0 && !check),
                "deepfast: clipping and the check for non-finite gradients need the statistics");
    const at::Device device = record.device();
    fp32_values(record, 3, "the record", device);
    check_question(grad_scale, found_inf, device);
    const double* known = statistics ? fp64_values(*statistics, 2, "statistics", device) : nullptr;
    Backend(device).decide(record, known, {grad_scale, found_inf, max_norm, check});
    written(record);
  }

  static void step(const std::string& rule, TensorList params, TensorList grads, TensorList masters, TensorList moments,
                   TensorList steps, const Tensor& hyper, const Tensor& groups, const Tensor& record, bool reset_grad) {
    Plan<Backend> plan(rule, params, masters, moments, steps, groups);
    plan.trust();
    check_count(grads.size(), params.size(), "gradients");
    OptionalTensors given;
    for (const Tensor& grad : grads) {
      dtype_of(grad, "a gradient");
      given.push_back(grad);
    }
    TORCH_CHECK(plan.gather(given, static_cast<int64_t>(reset_grad ? Afterwards::kReset : Afterwards::kKept)) !=
                    Plan<Backend>::kStale,
                "deepfast: parameters and gradients must be dense tensors on one device");
    const OptionalTensors no_lrs;
    std::optional<Tensor> norms;
    if (plan.needs_norms()) norms = plan.norms(hyper, no_lrs, record);
    plan.step(hyper, no_lrs, record, norms);
  }

  static void accumulate(TensorList sums, TensorList grads, double weight, bool overwrite) {
    check_count(grads.size(), sums.size(), "gradients");
    const at::Device device = sums[0].device();
    ElementOrder order(device);
    Spans spans(sums.size());
    for (size_t i = 0; i < sums.size(); ++i) {
      order.follow(sums[i]);
      TORCH_CHECK(sums[i].scalar_type() == at::kFloat, "deepfast: a sum has dtype ", sums[i].scalar_type());
      spans[i].param = order.write(sums[i], "a sum");
      spans[i].grad = order.read(grads[i], "a gradient");
      spans[i].grad_dtype = dtype_of(grads[i], "a gradient");
      spans[i].numel = sums[i].numel();
    }
    Backend(device).accumulate(spans, static_cast<float>(weight), overwrite);
    order.write_back();
    for (const Tensor& t : sums) written(t);
  }

  static void scaler_update(const Tensor& state, TensorList found_inf, double growth_factor, double backoff_factor,
                            int64_t growth_interval, int64_t hysteresis, bool consecutive_hysteresis, bool dynamic,
                            double min_scale, double max_scale) {
    float* values = fp32_values(state, 4, "the scaler's state", state.device());
    for (const Tensor& found : found_inf) fp32_values(found, 1, "found_inf", state.device());
    Backend(state.device())
        .scaler_update(values, found_inf,
                       {growth_factor, backoff_factor, growth_interval, hysteresis, consecutive_hysteresis, dynamic,
                        min_scale, max_scale});
    written(state);
  }

  static void implement(torch::Library& library) {
    library.impl("statistics", &statistics);
    library.impl("decide_", &decide);
    library.impl("step_", &step);
    library.impl("accumulate_", &accumulate);
    library.impl("scaler_update_", &scaler_update);
  }

  // The class `name` of plans on this backend.
  static void define_plan(torch::Library& library, const char* name) {
    using Tensors = std::vector<Tensor>;
    using P = Plan<Backend>;
    auto plan = library.class_<P>(name);
    if constexpr (requires { &Backend::norms_of_blocks; }) plan.def("norms_of_blocks", &P::norms_of_blocks);
    plan.def(torch::init(
                 [](std::string rule, Tensors params, Tensors masters, Tensors moments, Tensors steps, Tensor groups) {
                   return c10::make_intrusive<P>(std::move(rule), params, masters, moments, steps, groups);
                 }))
        .def("needs_norms", &P::needs_norms)
        .def("send_to", &P::send_to)
        .def("by_chance", &P::by_chance)
        .def("shards_of", [](const c10::intrusive_ptr<P>& self, const Tensors& wholes) { self->shards_of(wholes); })
        .def("expect", &P::expect)
        .def("gather", &P::gather)
        .def("statistics", &P::statistics)
        .def("decide", &P::decide)
        .def("norms", &P::norms)
        .def("step", &P::step)
        .def("settle", &P::settle)
        .def("refresh", &P::refresh)
        .def("gradient_memory", &P::gradient_memory);
  }
};

}  // namespace deepfast::bindings
