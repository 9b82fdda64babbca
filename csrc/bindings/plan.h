// What an optimizer's steps have in common: its parameters and their state, looked at once and kept.
//
// Each step only the gradients are new. A plan finds them by itself, so that Python does nothing per parameter.
// Python says when the parameters or the state's tensors are others (deepfast/optim/watched.py); what has become of the
// same tensors is looked at here.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../math/rules.h"
#include "element_order.h"
#include "tensors.h"

namespace deepfast::bindings {

// Backend: Cpu (cpu.h) or Cuda (cuda.h), which says what they have in common.
template <class Backend>
class Plan : public torch::CustomClassHolder {
 public:
  // masters: [n], an empty tensor where there is none. moments: all first moments, then all second ones, …
  // steps: [n], or none where the rule does not count. groups: int32 [n], each parameter's row of hyperparameters.
  // The plan keeps neither alive: who moves state away wants its memory back, and torch exchanges no parameter that
  // somebody else refers to, too (torch.utils.swap_tensors). Who makes a plan holds the parameters' Python objects.
  Plan(const std::string& rule, TensorList params, TensorList masters, TensorList moments, TensorList steps,
       const Tensor& groups)
      : rule_(find_rule(rule.c_str())),
        entries_(params.size()),
        device_(params.empty() ? at::Device(Backend::kDevice, 0) : params[0].device()),
        backend_(device_),
        order_(device_) {
    TORCH_CHECK(rule_ >= 0, "deepfast: the kernels have no rule named '", rule, "'");
    TORCH_CHECK(device_.type() == Backend::kDevice, "deepfast: a parameter lies on ", device_);
    info_ = kRules[rule_];
    const size_t count = params.size();
    check_count(masters.size(), count, "masters");
    check_count(moments.size(), count * info_.moments, "moments");
    check_count(steps.size(), info_.counts_steps ? count : 0, "step counts");
    TORCH_CHECK(
        groups.scalar_type() == at::kInt && groups.is_contiguous() && groups.numel() == static_cast<int64_t>(count),
        "deepfast: groups must be one int32 a parameter");
    for (size_t i = 0; i < count; ++i) {
      Entry& entry = entries_[i];
      entry.param = params[i].unsafeGetTensorImpl();
      entry.holder = holder(*entry.param);
      if (!entry.holder) entry.kept = params[i];
      entry.dtype = dtype_of(params[i], "a parameter");
      entry.group = groups.const_data_ptr<int32_t>()[i];
      entry.place = place(*entry.param);
      if (masters[i].numel() > 0) {
        entry.state[kMaster] = masters[i].getIntrusivePtr();
        masters_ = true;
      }
      if (info_.counts_steps) entry.state[kStep] = steps[i].getIntrusivePtr();
      for (int k = 0; k < info_.moments; ++k) entry.state[kMoment + k] = moments[k * count + i].getIntrusivePtr();
    }
  }

  bool needs_norms() const { return info_.needs_norms; }

  // Finds the gradients (each parameter's own, unless they are given) and says how many there are; kStale where the
  // plan does not fit any more: a parameter has changed its type or has been exchanged, or a gradient is none that the
  // kernels take. Masters of weights that somebody else has written to take over what was written.
  // after: an Afterwards, what becomes of the gradients.
  static constexpr int64_t kStale = -1;
  int64_t gather(const OptionalTensors& given, int64_t after) {
    TORCH_CHECK(after >= 0 && after <= static_cast<int64_t>(Afterwards::kWritten), "deepfast: no way ", after,
                " to leave a gradient");
    release();
    after_ = static_cast<Afterwards>(after);
    if (given.empty()) {
      const Tensor none;
      return gather_each([&](size_t i) {
        const at::TensorImpl* param = there(entries_[i]);
        return param ? &param->grad() : &none;
      });
    }
    check_count(given.size(), entries_.size(), "gradients");
    for (const std::optional<Tensor>& grad : given) given_.push_back(grad.value_or(Tensor()));
    return gather_each([&](size_t i) { return &given_[i]; });
  }

  // Of what `gather` has found: where each gradient's memory begins and ends.
  std::vector<int64_t> gradient_memory() const {
    std::vector<int64_t> out;
    for (const Span& span : spans_) {
      const auto [begin, end] = range_of_grad(span);
      out.insert(out.end(), {reinterpret_cast<int64_t>(begin), reinterpret_cast<int64_t>(end)});
    }
    return out;
  }

  // Masters that are as their weights' are to be, whatever those are now.
  void trust() {
    for (Entry& entry : entries_) entry.version = version(*entry.param);
  }

  // Takes over what has been written to any weight, by whoever: another step of the same memory, say.
  void refresh() {
    Spans written;
    for (const Span& span : spans_) {
      if (span.master) written.push_back(span);
    }
    if (!written.empty()) backend_.refresh(written);
  }

  Tensor statistics() { return backend_.statistics(spans_); }

  // The statistics, and the record that follows from them.
  void decide(const Tensor& record, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
              double max_norm, bool check) {
    fp32_values(record, 3, "the record", device_);
    check_question(grad_scale, found_inf, device_);
    backend_.decide(record, spans_, {grad_scale, found_inf, max_norm, check});
    written(record);
  }

  // fp64 [gradients, 2]: the sums of squares that `step` needs where the rule needs norms. Moves the moments on.
  Tensor norms(const Tensor& hyper, const OptionalTensors& lrs, const Tensor& record) {
    TORCH_CHECK(info_.needs_norms, "deepfast: '", info_.name, "' needs no norms");
    check(hyper, lrs, record);
    return backend_.norms(rule_, spans_, {hyper, lrs}, record);
  }

  // lrs: none, or for each group a tensor of one value on the parameters' device that stands for hyper[group, 1].
  void step(const Tensor& hyper, const OptionalTensors& lrs, const Tensor& record, const std::optional<Tensor>& norms) {
    check(hyper, lrs, record);
    const double* measured = nullptr;
    if (info_.needs_norms) {
      TORCH_CHECK(norms, "deepfast: '", info_.name, "' needs norms");
      measured = fp64_values(*norms, 2 * static_cast<int64_t>(spans_.size()), "the norms", device_);
    }
    backend_.step(rule_, spans_, {hyper, lrs}, record, measured, after_);
    order_.write_back();
    const int64_t count = active_.size();
#pragma omp parallel for if (count > kManyTensors)
    for (int64_t nth = 0; nth < count; ++nth) {
      const auto& [entry, grad] = active_[nth];
      written(*entry->param);
      if (after_ != Afterwards::kKept) written(*grad->unsafeGetTensorImpl());
      entry->stepped = true;
    }
    if (after_ == Afterwards::kReset) {
      for (const auto& [entry, grad] : active_) detach(*grad);
    }
    settle();
    release();
  }

  // What has been written to the parameters so far is known to their masters. `step` does this by itself; where other
  // steps follow it, of views of the same memory, they have written, too: autograd counts for all of them together.
  void settle() {
    if (!masters_) return;
    const int64_t count = entries_.size();
#pragma omp parallel for if (count > kManyTensors)
    for (int64_t i = 0; i < count; ++i) {
      Entry& entry = entries_[i];
      if (entry.stepped && has(entry, kMaster)) entry.version = version(*entry.param);
    }
  }

 private:
  enum Slot { kMaster, kStep, kMoment, kSlots = kMoment + kMaxMoments };
  using Weak = c10::weak_intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>;

  struct Entry {
    at::TensorImpl* param;
    const void* const* holder;  // where its Python object says that it is this one
    Tensor kept;                // the parameter, if it has none
    DType dtype;
    int32_t group;
    Weak state[kSlots] = {none(), none(), none(), none(), none()};
    int64_t version = kUnknown;  // of the parameter when its master was last right
    bool stepped = false;        // since the last `gather`
    // What `look` has found, valid as long as nothing has moved.
    bool looked = false;
    Span span;
    at::DimVector strides;
    const void* place;
    const void* places[kSlots];
  };
  static_assert(kSlots == 5);
  static constexpr int64_t kUnknown = -1;

  // Tensor objects lie anywhere, and a step's data pushes them out of the caches: several threads wait less than one.
  static constexpr int64_t kManyTensors = 500;

  static Weak none() { return Weak(Tensor().getIntrusivePtr()); }

  // Autograd's count of writes.
  static int64_t version(at::TensorImpl& t) { return t.is_inference() ? 0 : t.version_counter().current_version(); }

  // The word of its Python object that points to `t`: behind the object's head (two words), where exactly differs from
  // torch to torch. (Even a weak reference would keep torch from exchanging what it points to.)
  static const void* const* holder(const at::TensorImpl& t) {
    const auto* words = reinterpret_cast<const void* const*>(t.pyobj_slot()->load_pyobj());
    for (int word = 2; words && word < 5; ++word) {
      if (words[word] == &t) return words + word;
    }
    return nullptr;
  }

  // The parameter, unless it has been exchanged for another.
  static at::TensorImpl* there(const Entry& entry) {
    return !entry.holder || *entry.holder == entry.param ? entry.param : nullptr;
  }

  bool plain(const Tensor& t) const {
    return t.layout() == at::kStrided && t.device() == device_ && kernel_dtype(t.scalar_type()) && !t.is_neg() &&
           !t.key_set().has(c10::DispatchKey::Python);
  }

  // What a glance at a parameter and its gradient tells. Mostly kReady: all as in the last step but the gradient's
  // place.
  enum class Found : uint8_t { kNothing, kReady, kOther, kStale };

  Found glance(Entry& entry, const Tensor& grad, Span& span) const {
    entry.stepped = false;
    const at::TensorImpl* param = there(entry);
    if (!param || param->device() != device_ || place(*param) != entry.place ||
        kernel_dtype(c10::typeMetaToScalarType(param->dtype())) != entry.dtype) {
      return Found::kStale;
    }
    if (!grad.defined()) return Found::kNothing;
    if (!plain(grad)) return Found::kStale;
    if (entry.looked && param->strides() != entry.strides) return Found::kStale;  // Python lays its state anew
    if (!entry.looked || param->numel() != entry.span.numel || !same_order(*grad.unsafeGetTensorImpl(), *param) ||
        !unmoved(entry, *param)) {
      return Found::kOther;
    }
    span = entry.span;
    span.grad = grad.data_ptr();
    span.grad_dtype = *kernel_dtype(grad.scalar_type());
    return Found::kReady;
  }

  template <class GradientOf>
  int64_t gather_each(const GradientOf& gradient_of) {
    order_ = ElementOrder(device_);
    const int64_t count = entries_.size();
    spans_.resize(count);
    active_.resize(count);
    std::vector<Found> found(count);
#pragma omp parallel for if (count > kManyTensors)
    for (int64_t i = 0; i < count; ++i) found[i] = glance(entries_[i], *gradient_of(i), spans_[i]);
    try {
      Spans written;  // past their masters
      int64_t kept = 0;
      for (int64_t i = 0; i < count; ++i) {
        Entry& entry = entries_[i];
        if (found[i] == Found::kNothing) continue;
        if (found[i] == Found::kStale) return release(), kStale;
        const Tensor& grad = *gradient_of(i);
        spans_[kept] = found[i] == Found::kReady ? spans_[i] : look(entry, grad);
        if (has(entry, kMaster) && version(*entry.param) != entry.version) written.push_back(spans_[kept]);
        active_[kept++] = {&entry, &grad};
      }
      spans_.resize(kept);
      active_.resize(kept);
      if (after_ != Afterwards::kKept) check_distinct();
      if (!written.empty()) backend_.refresh(written);
    } catch (...) {
      release();
      throw;
    }
    return spans_.size();
  }

  // Everything checked, and brought into one element order.
  Span look(Entry& entry, const Tensor& grad) {
    const auto param = Tensor(c10::intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(entry.param));
    Span span = {};
    order_.follow(param);
    const size_t copies = order_.copies();
    span.param_dtype = entry.dtype;
    span.group = entry.group;
    span.numel = param.numel();
    span.param = order_.write(param, "a parameter");
    if (has(entry, kMaster)) span.master = fp32_state(entry, kMaster, "a master");
    if (info_.counts_steps) span.step = fp32_values(held(entry, kStep), 1, "a step count", device_);
    for (int k = 0; k < info_.moments; ++k) span.moment[k] = fp32_state(entry, kMoment + k, "a moment");
    entry.looked = order_.copies() == copies;
    entry.span = span;
    entry.strides = param.strides();
    for (int slot = 0; slot < kSlots; ++slot) {
      if (has(entry, slot)) entry.places[slot] = place(*entry.state[slot]._unsafe_get_target());
    }
    span.grad = after_ != Afterwards::kKept ? order_.write(grad, "a gradient") : order_.read(grad, "a gradient");
    span.grad_dtype = dtype_of(grad, "a gradient");
    return span;
  }

  static bool has(const Entry& entry, int slot) {
    return entry.state[slot]._unsafe_get_target() != c10::UndefinedTensorImpl::singleton();
  }

  // The state tensor, which the optimizer's state dictionary must still hold.
  static Tensor held(const Entry& entry, int slot) {
    Tensor t(entry.state[slot].lock());
    TORCH_CHECK(t.defined(), "deepfast: a tensor of the optimizer's state is gone");
    return t;
  }

  float* fp32_state(const Entry& entry, int slot, const char* what) {
    const Tensor t = held(entry, slot);
    TORCH_CHECK(t.scalar_type() == at::kFloat, "deepfast: ", what, " has dtype ", t.scalar_type());
    return static_cast<float*>(order_.write(t, what));
  }

  // Whether the state is where `look` has found it. Somebody may have given it other memory (`.data =`, share_memory_).
  static bool unmoved(const Entry& entry, const at::TensorImpl& param) {
    for (int slot = 0; slot < kSlots; ++slot) {
      if (!has(entry, slot)) continue;
      const at::TensorImpl& t = *entry.state[slot]._unsafe_get_target();  // its memory is there, if nothing else
      if (entry.state[slot].use_count() == 0 || place(t) != entry.places[slot]) return false;
      if (slot != kStep && !same_order(t, param)) return false;
    }
    return true;
  }

  static bool same_order(const at::TensorImpl& t, const at::TensorImpl& param) {
    return t.sizes() == param.sizes() && t.strides() == param.strides();
  }

  static const void* place(const at::TensorImpl& t) {
    if (!t.unsafe_storage()) return nullptr;
    const auto* data = static_cast<const char*>(t.unsafe_storage().unsafeGetStorageImpl()->data());
    return data + t.storage_offset() * t.itemsize();
  }

  void check(const Tensor& hyper, const OptionalTensors& lrs, const Tensor& record) const {
    TORCH_CHECK(hyper.scalar_type() == at::kDouble && hyper.dim() == 2 && hyper.is_contiguous() && hyper.is_cpu(),
                "deepfast: hyper must be a contiguous float64 matrix");
    TORCH_CHECK(hyper.size(1) == info_.hyper, "deepfast: '", info_.name, "' takes ", info_.hyper,
                " hyperparameters, got ", hyper.size(1));
    for (const Span& span : spans_) {
      TORCH_CHECK(span.group >= 0 && span.group < hyper.size(0), "deepfast: group ", span.group, " of ", hyper.size(0));
    }
    if (!lrs.empty()) check_count(lrs.size(), hyper.size(0), "learning rates");
    for (size_t group = 0; group < lrs.size(); ++group) {
      const std::optional<Tensor> lr = lrs.get(group);
      if (!lr) continue;
      TORCH_CHECK(lr->numel() == 1 && (lr->scalar_type() == at::kFloat || lr->scalar_type() == at::kDouble),
                  "deepfast: a learning rate must be one float32 or float64 value");
      check_device(*lr, device_, "a learning rate");
    }
    fp32_values(record, 3, "the record", device_);
  }

  static std::pair<const char*, const char*> range_of_grad(const Span& span) {
    const auto* begin = static_cast<const char*>(span.grad);
    return {begin, begin + span.numel * (span.grad_dtype == DType::kFloat32 ? 4 : 2)};
  }

  // What is written to a gradient that another parameter has yet to read would change that one's update.
  void check_distinct() const {
    std::vector<std::pair<const char*, const char*>> grads;
    for (const Span& span : spans_) {
      if (span.numel > 0) grads.push_back(range_of_grad(span));
    }
    std::sort(grads.begin(), grads.end());
    for (size_t i = 1; i < grads.size(); ++i) {
      TORCH_CHECK(grads[i - 1].second <= grads[i].first,
                  "deepfast: two parameters share one gradient tensor, and the step would write to it (reset_grad, or "
                  "a GradScaler's unscaling) before both have read it");
    }
  }

  // A gradient that was made with create_graph=True holds on to its graph; a zero has none, as after zero_grad().
  static void detach(const Tensor& grad) {
    if (grad.requires_grad() && !grad.is_view()) Tensor(grad).detach_();
  }

  void release() {
    spans_.clear();
    active_.clear();
    given_.clear();
    order_ = ElementOrder(device_);
  }

  int rule_;
  RuleInfo info_;
  bool masters_ = false;  // whether there are any
  std::vector<Entry> entries_;
  at::Device device_;
  Backend backend_;

  // From `gather` to the end of `step`.
  Afterwards after_ = Afterwards::kKept;
  std::vector<Tensor> given_;
  Spans spans_;                                           // of the parameters that have a gradient,
  std::vector<std::pair<Entry*, const Tensor*>> active_;  // which one each is, and its gradient
  ElementOrder order_;
};

}  // namespace deepfast::bindings
