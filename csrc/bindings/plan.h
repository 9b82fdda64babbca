// What an optimizer's steps have in common: its parameters and their state, looked at once and kept.
//
// Each step only the gradients are new. A plan finds them by itself, so that Python does nothing per parameter.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "element_order.h"

namespace deepfast::bindings {

using at::TensorList;

inline std::optional<DType> kernel_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
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
  const std::optional<DType> dtype = kernel_dtype(t);
  TORCH_CHECK(dtype, "deepfast: ", what, " has dtype ", t.scalar_type(), "; the kernels take float32, float16 and ",
              "bfloat16 (others run on backend=\"reference\")");
  return *dtype;
}

inline void check_count(size_t got, size_t count, const char* what) {
  TORCH_CHECK(got == count, "deepfast: ", count, " tensors of ", what, " expected, got ", got);
}

inline float* fp32_values(const Tensor& t, int64_t numel, const char* what) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.numel() == numel && t.is_contiguous(), "deepfast: ", what, " must be ",
              numel, " contiguous float32 values, got ", t.numel(), " of ", t.scalar_type());
  return t.mutable_data_ptr<float>();
}

// Autograd must know what was written behind its back: a graph that still needs the old values has to refuse.
inline void written(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

inline int64_t version(const Tensor& t) { return t.is_inference() ? 0 : t._version(); }

inline Tensor to_tensor(const Statistics& statistics) {
  Tensor out = at::empty({2}, at::kDouble);
  out.mutable_data_ptr<double>()[0] = statistics.sum_of_squares;
  out.mutable_data_ptr<double>()[1] = statistics.non_finite;
  return out;
}

class Plan : public torch::CustomClassHolder {
 public:
  using Pointer = c10::intrusive_ptr<Plan>;
  using Gradients = c10::List<std::optional<Tensor>>;

  // masters: [n], an empty tensor where there is none. moments: all first moments, then all second ones, …
  // steps: [n], or none where the rule does not count. groups: int32 [n], each parameter's row of hyperparameters.
  // waiting: parameters without state; should one of them have a gradient, the plan is stale.
  Plan(std::string rule, std::vector<Tensor> params, std::vector<Tensor> masters, const std::vector<Tensor>& moments,
       std::vector<Tensor> steps, const Tensor& groups, std::vector<Tensor> waiting)
      : rule_(std::move(rule)), waiting_(std::move(waiting)), entries_(params.size()) {
    const std::optional<cpu::RuleInfo> info = cpu::info(rule_.c_str());
    TORCH_CHECK(info, "deepfast: the CPU backend has no rule named '", rule_, "'");
    info_ = *info;
    const size_t count = params.size();
    check_count(masters.size(), count, "masters");
    check_count(moments.size(), count * info_.moments, "moments");
    check_count(steps.size(), info_.counts_steps ? count : 0, "step counts");
    TORCH_CHECK(
        groups.scalar_type() == at::kInt && groups.is_contiguous() && groups.numel() == static_cast<int64_t>(count),
        "deepfast: groups must be one int32 a parameter");
    for (size_t i = 0; i < count; ++i) {
      Entry& entry = entries_[i];
      entry.param = std::move(params[i]);
      entry.dtype = dtype_of(entry.param, "a parameter");
      entry.version = version(entry.param);
      entry.group = groups.const_data_ptr<int32_t>()[i];
      if (masters[i].numel() > 0) entry.master = std::move(masters[i]);
      for (int k = 0; k < info_.moments; ++k) entry.moment[k] = moments[k * count + i];
      if (info_.counts_steps) entry.step = std::move(steps[i]);
    }
  }

  bool needs_norms() const { return info_.needs_norms; }

  // Finds the gradients (each parameter's own, unless they are given) and returns how many there are, or kStale where
  // the plan does not fit any more: a parameter has changed its type or place or was written to from outside, one that
  // was waiting has a gradient, or a gradient is none that the kernels take.
  static constexpr int64_t kStale = -1;
  int64_t gather(const Gradients& given, bool reset_grad) {
    for (const Tensor& p : waiting_) {
      if (p.grad().defined()) return kStale;
    }
    if (given.empty()) {
      return gather_each(reset_grad, [&](size_t i) { return &entries_[i].param.grad(); });
    }
    std::vector<Tensor> grads;
    for (const std::optional<Tensor>& grad : given) grads.push_back(grad.value_or(Tensor()));
    return gather(std::move(grads), reset_grad);
  }

  int64_t gather(std::vector<Tensor> given, bool reset_grad) {
    check_count(given.size(), entries_.size(), "gradients");
    release();
    given_ = std::move(given);
    return gather_each(reset_grad, [&](size_t i) { return &given_[i]; });
  }

  Tensor statistics() const { return to_tensor(cpu::statistics(spans_.data(), spans_.size())); }

  // fp64 [gradients, 2]: the sums of squares that `step` needs where the rule needs norms. Moves the moments on.
  Tensor norms(const Tensor& hyper, const Tensor& record) const {
    TORCH_CHECK(info_.needs_norms, "deepfast: '", rule_, "' needs no norms");
    check(hyper);
    Tensor out = at::empty({static_cast<int64_t>(spans_.size()), 2}, at::kDouble);
    cpu::norms(rule_.c_str(), spans_.data(), spans_.size(), hyper.const_data_ptr<double>(), hyper.size(1), read(record),
               static_cast<Norms*>(out.mutable_data_ptr()));
    return out;
  }

  void step(const Tensor& hyper, const Tensor& record, const std::optional<Tensor>& norms) {
    check(hyper);
    const StepRecord decided = read(record);
    const Norms* measured = nullptr;
    if (info_.needs_norms) {
      TORCH_CHECK(norms && norms->scalar_type() == at::kDouble && norms->is_contiguous() &&
                      norms->numel() == 2 * static_cast<int64_t>(spans_.size()),
                  "deepfast: '", rule_, "' needs the norms of ", spans_.size(), " parameters, 2 float64 values each");
      measured = static_cast<const Norms*>(norms->const_data_ptr());
    }
    cpu::step(rule_.c_str(), spans_.data(), spans_.size(), hyper.const_data_ptr<double>(), hyper.size(1), decided,
              measured, reset_grad_);
    order_.write_back();
    for (const auto& [entry, grad] : active_) {
      written(entry->param);
      if (entry->master.defined()) written(entry->master);
      if (reset_grad_) written(*grad);
      entry->version = version(entry->param);
    }
    release();
  }

  // Each parameter's version counter after its last step.
  std::vector<int64_t> versions() const {
    std::vector<int64_t> out;
    for (const Entry& entry : entries_) out.push_back(entry.version);
    return out;
  }

 private:
  static constexpr int kTensors = 3 + kMaxMoments;  // parameter, master, step count, moments

  struct Entry {
    Tensor param, master, step, moment[kMaxMoments];
    DType dtype;
    int32_t group;
    int64_t version;
    // What `look` has found, valid as long as nothing has moved.
    Span span;
    const void* places[kTensors];
    bool looked = false;
  };

  static bool plain(const Tensor& grad) {
    return grad.layout() == at::kStrided && grad.device().is_cpu() && kernel_dtype(grad) && !grad.is_neg() &&
           !grad.key_set().has(c10::DispatchKey::Python);
  }

  // What a glance at a parameter and its gradient tells. Mostly kReady: all as in the last step but the gradient's
  // place.
  enum class Found : uint8_t { kNothing, kReady, kOther, kStale };

  static Found glance(const Entry& entry, const Tensor& grad, Span& span) {
    if (!entry.param.device().is_cpu() || kernel_dtype(entry.param) != entry.dtype) return Found::kStale;
    if (entry.master.defined() && version(entry.param) != entry.version) return Found::kStale;
    if (!grad.defined()) return Found::kNothing;
    if (!plain(grad)) return Found::kStale;
    if (!entry.looked || !unmoved(entry)) return Found::kOther;
    if (grad.strides() != entry.param.strides() || grad.sizes() != entry.param.sizes()) return Found::kOther;
    span = entry.span;
    span.grad = grad.data_ptr();
    span.grad_dtype = *kernel_dtype(grad);
    return Found::kReady;
  }

  template <class GradientOf>
  int64_t gather_each(bool reset_grad, const GradientOf& gradient_of) {
    reset_grad_ = reset_grad;
    order_ = ElementOrder();
    const int64_t count = entries_.size();
    spans_.resize(count);
    active_.resize(count);
    std::vector<Found> found(count);
    // Tensor objects lie anywhere, and the last step's data has pushed them out of the caches: two threads wait less.
#pragma omp parallel for if (count > 500)
    for (int64_t i = 0; i < count; ++i) found[i] = glance(entries_[i], *gradient_of(i), spans_[i]);
    try {
      int64_t kept = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (found[i] == Found::kNothing) continue;
        if (found[i] == Found::kStale) return release(), kStale;
        const Tensor& grad = *gradient_of(i);
        spans_[kept] = found[i] == Found::kReady ? spans_[i] : look(entries_[i], grad);
        active_[kept++] = {&entries_[i], &grad};
      }
      spans_.resize(kept);
      active_.resize(kept);
      if (reset_grad) check_distinct();
    } catch (...) {
      release();
      throw;
    }
    return spans_.size();
  }

  // Everything checked, and brought into one element order.
  Span look(Entry& entry, const Tensor& grad) {
    Span span = {};
    order_.follow(entry.param);
    const size_t copies = order_.copies();
    span.param_dtype = entry.dtype;
    span.group = entry.group;
    span.numel = entry.param.numel();
    span.param = order_.write(entry.param, "a parameter");
    if (entry.master.defined()) {
      TORCH_CHECK(entry.master.scalar_type() == at::kFloat, "deepfast: a master has dtype ",
                  entry.master.scalar_type());
      span.master = static_cast<float*>(order_.write(entry.master, "a master"));
    }
    if (info_.counts_steps) span.step = fp32_values(entry.step, 1, "a step count");
    for (int k = 0; k < info_.moments; ++k) {
      const Tensor& moment = entry.moment[k];
      TORCH_CHECK(moment.scalar_type() == at::kFloat, "deepfast: a moment has dtype ", moment.scalar_type());
      span.moment[k] = static_cast<float*>(order_.write(moment, "a moment"));
    }
    entry.looked = order_.copies() == copies;
    entry.span = span;
    for_tensors(entry, [&](int slot, const Tensor& t) { return entry.places[slot] = place(t), true; });
    span.grad = reset_grad_ ? order_.write(grad, "a gradient") : order_.read(grad, "a gradient");
    span.grad_dtype = dtype_of(grad, "a gradient");
    return span;
  }

  static bool unmoved(const Entry& entry) {
    return for_tensors(entry, [&](int slot, const Tensor& t) { return entry.places[slot] == place(t); });
  }

  template <class Call>
  static bool for_tensors(const Entry& entry, const Call& call) {
    bool result = call(0, entry.param);
    if (entry.master.defined()) result &= call(1, entry.master);
    if (entry.step.defined()) result &= call(2, entry.step);
    for (int k = 0; k < kMaxMoments && entry.moment[k].defined(); ++k) result &= call(3 + k, entry.moment[k]);
    return result;
  }

  // A tensor object keeps its shape and type; what somebody may give it is other memory (`.data =`, share_memory_).
  static const void* place(const Tensor& t) {
    const at::TensorImpl* impl = t.unsafeGetTensorImpl();
    const auto* data = static_cast<const char*>(impl->unsafe_storage().unsafeGetStorageImpl()->data());
    return data + impl->storage_offset() * impl->itemsize();
  }

  void check(const Tensor& hyper) const {
    TORCH_CHECK(hyper.scalar_type() == at::kDouble && hyper.dim() == 2 && hyper.is_contiguous(),
                "deepfast: hyper must be a contiguous float64 matrix");
    TORCH_CHECK(hyper.size(1) == info_.hyper, "deepfast: '", rule_, "' takes ", info_.hyper, " hyperparameters, got ",
                hyper.size(1));
    for (const Span& span : spans_) {
      TORCH_CHECK(span.group >= 0 && span.group < hyper.size(0), "deepfast: group ", span.group, " of ", hyper.size(0));
    }
  }

  static StepRecord read(const Tensor& record) {
    StepRecord decided;
    std::memcpy(&decided, fp32_values(record, 3, "the record"), sizeof decided);
    return decided;
  }

  // Zeroing a gradient that another parameter has yet to read would lose that one's update.
  void check_distinct() const {
    std::vector<const void*> grads;
    for (const Span& span : spans_) {
      if (span.numel > 0) grads.push_back(span.grad);
    }
    std::sort(grads.begin(), grads.end());
    TORCH_CHECK(
        std::adjacent_find(grads.begin(), grads.end()) == grads.end(),
        "deepfast: two parameters share one gradient tensor, and reset_grad would zero it before both have read it");
  }

  // Keeps no gradient alive.
  void release() {
    spans_.clear();
    active_.clear();
    given_.clear();
    order_ = ElementOrder();
  }

  std::string rule_;
  std::vector<Tensor> waiting_;
  std::vector<Entry> entries_;
  cpu::RuleInfo info_;

  // From `gather` to the end of `step`.
  bool reset_grad_ = false;
  std::vector<Tensor> given_;
  std::vector<Span> spans_;
  std::vector<std::pair<Entry*, const Tensor*>> active_;
  ElementOrder order_;
};

}  // namespace deepfast::bindings
