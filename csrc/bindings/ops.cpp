// torch.ops.deepfast.*: schemas, checks, and tensors turned into spans. The only file that sees torch.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"

namespace deepfast::bindings {
namespace {

using at::Tensor;
using at::TensorList;

DType dtype_of(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK(false, "deepfast: ", what, " has dtype ", t.scalar_type(), "; the kernels take float32, float16 and ",
                  "bfloat16 (others run on backend=\"reference\")");
  }
}

void check_count(TensorList list, size_t count, const char* what) {
  TORCH_CHECK(list.size() == count, "deepfast: ", count, " tensors of ", what, " expected, got ", list.size());
}

float* fp32_values(const Tensor& t, int64_t numel, const char* what) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.numel() == numel && t.is_contiguous(), "deepfast: ", what, " must be ",
              numel, " contiguous float32 values, got ", t.numel(), " of ", t.scalar_type());
  return t.mutable_data_ptr<float>();
}

// Brings tensors into one element order. A tensor that lies in another one is copied, and what a kernel writes into
// the copy is copied back: a transposed gradient or a strided parameter is slower, never wrong.
class ElementOrder {
 public:
  // From here on, the order of `param`: its own where it is dense in memory, else the contiguous one. `param` stays.
  void follow(const Tensor& param) {
    sizes_ = param.sizes();
    strides_ = param.strides();
    if (!param.is_non_overlapping_and_dense()) {
      copies_.push_back(param.new_empty(sizes_));
      strides_ = copies_.back().strides();
    }
  }

  void* read(const Tensor& t, const char* what) {
    TORCH_CHECK(t.device().is_cpu() && t.layout() == at::kStrided, "deepfast: ", what,
                " must be a dense CPU tensor, got ", t.layout(), " on ", t.device());
    TORCH_CHECK(t.sizes() == sizes_, "deepfast: ", what, " has shape ", t.sizes(), ", its parameter ", sizes_);
    if (t.strides() == strides_ || t.numel() == 0) return t.data_ptr();
    copies_.push_back(t.new_empty_strided(sizes_, strides_).copy_(t));
    return copies_.back().data_ptr();
  }

  void* write(const Tensor& t, const char* what) {
    check_no_overlap(t, what);
    const size_t before = copies_.size();
    void* data = read(t, what);
    if (copies_.size() > before) written_.emplace_back(t, copies_.back());
    return data;
  }

  void write_back() const {
    for (const auto& [original, copy] : written_) original.copy_(copy);
  }

  static void check_no_overlap(const Tensor& t, const char* what) {
    TORCH_CHECK(at::has_internal_overlap(t) != at::MemOverlap::Yes, "deepfast: ", what, " of shape ", t.sizes(),
                " is written to, but has elements that share memory (an expanded view?): clone() it");
  }

 private:
  at::IntArrayRef sizes_, strides_;
  std::deque<Tensor> copies_;  // strides_ may point into one
  std::vector<std::pair<Tensor, Tensor>> written_;
};

// Autograd must know what was written behind its back: a graph that still needs the old values has to refuse.
void written(TensorList tensors) {
  for (const Tensor& t : tensors) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
}

Tensor statistics(TensorList grads) {
  ElementOrder order;
  std::vector<Span> spans(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    order.follow(grads[i]);
    spans[i].grad = order.read(grads[i], "a gradient");
    spans[i].grad_dtype = dtype_of(grads[i], "a gradient");
    spans[i].numel = grads[i].numel();
  }
  const Statistics result = cpu::statistics(spans.data(), spans.size());
  Tensor out = at::empty({2}, at::kDouble);
  out.mutable_data_ptr<double>()[0] = result.sum_of_squares;
  out.mutable_data_ptr<double>()[1] = result.non_finite;
  return out;
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

// Zeroing a gradient that another parameter has yet to read would lose that one's update.
void check_distinct(const std::vector<Span>& spans) {
  std::vector<const void*> grads;
  for (const Span& span : spans) {
    if (span.numel > 0) grads.push_back(span.grad);
  }
  std::sort(grads.begin(), grads.end());
  TORCH_CHECK(
      std::adjacent_find(grads.begin(), grads.end()) == grads.end(),
      "deepfast: two parameters share one gradient tensor, and reset_grad would zero it before both have read it");
}

void step(const std::string& rule, TensorList params, TensorList grads, TensorList masters, TensorList moments,
          TensorList steps, const Tensor& hyper, const Tensor& groups, const Tensor& record, bool reset_grad) {
  const size_t count = params.size();
  const auto [kept, values] = cpu::size_of(rule.c_str());
  TORCH_CHECK(kept >= 0, "deepfast: the CPU backend has no rule named '", rule, "'");
  check_count(grads, count, "gradients");
  check_count(masters, count, "masters");
  check_count(moments, count * kept, "moments");
  check_count(steps, count, "step counts");
  TORCH_CHECK(hyper.scalar_type() == at::kDouble && hyper.dim() == 2 && hyper.is_contiguous(),
              "deepfast: hyper must be a contiguous float64 matrix");
  TORCH_CHECK(hyper.size(1) == values, "deepfast: '", rule, "' takes ", values, " hyperparameters, got ",
              hyper.size(1));
  TORCH_CHECK(
      groups.scalar_type() == at::kInt && groups.numel() == static_cast<int64_t>(count) && groups.is_contiguous(),
      "deepfast: groups must be one int32 a parameter");

  ElementOrder order;
  std::vector<Span> spans(count);
  for (size_t i = 0; i < count; ++i) {
    Span& span = spans[i];
    order.follow(params[i]);
    span.param_dtype = dtype_of(params[i], "a parameter");
    span.grad_dtype = dtype_of(grads[i], "a gradient");
    span.numel = params[i].numel();
    span.param = order.write(params[i], "a parameter");
    span.grad = reset_grad ? order.write(grads[i], "a gradient") : order.read(grads[i], "a gradient");
    span.master = nullptr;
    if (masters[i].numel() > 0) {  // an empty tensor stands for none
      TORCH_CHECK(masters[i].scalar_type() == at::kFloat, "deepfast: a master has dtype ", masters[i].scalar_type());
      span.master = static_cast<float*>(order.write(masters[i], "a master"));
    }
    span.step = fp32_values(steps[i], 1, "a step count");
    span.group = groups.const_data_ptr<int32_t>()[i];
    TORCH_CHECK(span.group >= 0 && span.group < hyper.size(0), "deepfast: group ", span.group, " of ", hyper.size(0));
    for (int k = 0; k < kept; ++k) {
      const Tensor& moment = moments[k * count + i];
      TORCH_CHECK(moment.scalar_type() == at::kFloat, "deepfast: a moment has dtype ", moment.scalar_type());
      span.moment[k] = static_cast<float*>(order.write(moment, "a moment"));
    }
  }
  StepRecord decided;
  std::memcpy(&decided, fp32_values(record, 3, "the record"), sizeof decided);
  if (reset_grad) check_distinct(spans);
  cpu::step(rule.c_str(), spans.data(), count, hyper.const_data_ptr<double>(), hyper.size(1), decided, reset_grad);
  order.write_back();
  for (const TensorList list : {params, masters, moments, steps}) written(list);
  if (reset_grad) written(grads);
}

void accumulate(TensorList sums, TensorList grads, double weight, bool overwrite) {
  check_count(grads, sums.size(), "gradients");
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
  written(sums);
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
