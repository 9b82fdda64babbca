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
#include "dtensor.h"
#include "element_order.h"
#include "entry.h"
#include "tensors.h"

namespace deepfast::bindings {

// Backend: Cpu (cpu.h) or Cuda (cuda.h), which says what they have in common.
template <class Backend>
class Plan : public torch::CustomClassHolder {
 public:
  // masters: [n], an empty tensor where there is none. moments: all first moments, then all second ones, …
  // steps: [n], or none where neither the rule counts nor chance is asked for. groups: int32 [n], each parameter's row
  // of hyperparameters. The plan keeps neither alive (entry.h).
  Plan(const std::string& rule, TensorList params, TensorList masters, TensorList moments, TensorList steps,
       const Tensor& groups)
      : rule_(find_rule(rule.c_str())),
        device_(params.empty() ? at::Device(Backend::kDevice, 0) : params[0].device()),
        backend_(device_),
        order_(device_) {
    TORCH_CHECK(rule_ >= 0, "deepfast: the kernels have no rule named '", rule, "'");
    TORCH_CHECK(device_.type() == Backend::kDevice, "deepfast: a parameter lies on ", device_);
    info_ = kRules[rule_];
    const size_t count = params.size();
    check_count(masters.size(), count, "masters");
    check_count(moments.size(), count * info_.moments, "moments");
    const bool counts = info_.counts_steps || !steps.empty();
    check_count(steps.size(), counts ? count : 0, "step counts");
    TORCH_CHECK(
        groups.scalar_type() == at::kInt && groups.is_contiguous() && groups.numel() == static_cast<int64_t>(count),
        "deepfast: groups must be one int32 a parameter");
    entries_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      Entry& entry = entries_.emplace_back(params[i], groups.const_data_ptr<int32_t>()[i]);
      if (masters[i].numel() > 0) {
        entry.keep(Entry::kMaster, masters[i]);
        masters_ = true;
      }
      if (counts) entry.keep(Entry::kStep, steps[i]);
      for (int k = 0; k < info_.moments; ++k) entry.keep(Entry::kMoment + k, moments[k * count + i]);
    }
  }

  bool needs_norms() const { return info_.needs_norms; }

  // From now on steps write each new weight this many bytes further on, too: where other ranks have theirs.
  void send_to(std::vector<int64_t> displacements) { sinks_ = std::move(displacements); }

  // Of what is rounded by chance (csrc/codec/noise.h): each parameter's seed, and where in the whole one its first
  // element is. That is moments in 8 bits and, with `weights`, weights without a master. The step counts are needed.
  void by_chance(const std::vector<int64_t>& seeds, const std::vector<int64_t>& first, bool weights) {
    check_count(seeds.size(), entries_.size(), "seeds");
    check_count(first.size(), entries_.size(), "places");
    for (size_t i = 0; i < seeds.size(); ++i) {
      TORCH_CHECK(entries_[i].has(Entry::kStep), "deepfast: rounding by chance needs step counts");
      entries_[i].round_by_chance(seeds[i], first[i], weights);
    }
  }

  // The parameters are this rank's shards of these DTensors: a step writes to those, too, and who writes to them has
  // written to the parameters.
  void shards_of(TensorList wholes) {
    check_count(wholes.size(), entries_.size(), "DTensors");
    for (size_t i = 0; i < wholes.size(); ++i) entries_[i].whole.emplace(wholes[i]);
  }

  // From now on `gather` finds gradients of DTensors by itself that lie as is expected. All are addresses of Python
  // objects, which the caller keeps. layouts: of each DTensor's gradient what says how it lies, if it lies as the
  // DTensor. type, bytes, layout: of the first DTensor its class, how large that one's objects are, and its layout.
  void expect(const std::vector<int64_t>& layouts, int64_t type, int64_t bytes, int64_t layout) {
    check_count(layouts.size(), entries_.size(), "layouts");
    const auto at = [](int64_t address) { return reinterpret_cast<const void*>(address); };
    for (size_t i = 0; i < layouts.size(); ++i) entries_[i].expected = at(layouts[i]);
    if (entries_.empty() || !entries_[0].whole) return;
    const void* shard = entries_[0].param->pyobj_slot()->load_pyobj();
    slots_ = Slots(entries_[0].whole->object(), at(type), bytes, shard, at(layout));
  }

  // Finds the gradients (each parameter's own, unless they are given) and says how many there are; kStale where the
  // plan does not fit any more: a parameter has changed its type or has been exchanged, or a gradient is none that the
  // kernels take; kUnseen where a DTensor or its gradient is not as expected, and the gradients are to be given.
  // Masters of weights that somebody else has written to take over what was written.
  // after: an Afterwards, what becomes of the gradients.
  static constexpr int64_t kStale = -1, kUnseen = -2;
  int64_t gather(const OptionalTensors& given, int64_t after) {
    TORCH_CHECK(after >= 0 && after <= static_cast<int64_t>(Afterwards::kWritten), "deepfast: no way ", after,
                " to leave a gradient");
    release();
    after_ = static_cast<Afterwards>(after);
    if (given.empty() && !entries_.empty() && entries_[0].whole) {
      return gather_each([&](size_t i) { return slots_.find(entries_[i]); });
    }
    if (given.empty()) {
      const Tensor none;
      return gather_each([&](size_t i) {
        const at::TensorImpl* param = entries_[i].there();
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
    for (Entry& entry : entries_) entry.known = entry.writes();
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

  // The same before they are added up: fp64 [blocks, 2], of all blocks of each gradient's parameter
  // (csrc/math/squares.h).
  Tensor norms_of_blocks(const Tensor& hyper, const OptionalTensors& lrs, const Tensor& record) {
    TORCH_CHECK(info_.needs_norms, "deepfast: '", info_.name, "' needs no norms");
    check(hyper, lrs, record);
    return backend_.norms_of_blocks(rule_, spans_, {hyper, lrs}, record);
  }

  // lrs: none, or for each group a tensor of one value on the parameters' device that stands for hyper[group, 1].
  void step(const Tensor& hyper, const OptionalTensors& lrs, const Tensor& record, const std::optional<Tensor>& norms) {
    check(hyper, lrs, record);
    const double* measured = nullptr;
    if (info_.needs_norms) {
      TORCH_CHECK(norms, "deepfast: '", info_.name, "' needs norms");
      measured = fp64_values(*norms, 2 * static_cast<int64_t>(spans_.size()), "the norms", device_);
    }
    backend_.step(rule_, spans_, {hyper, lrs}, record, measured, after_, sinks_);
    order_.write_back();
    const int64_t count = active_.size();
#pragma omp parallel for if (count > kManyTensors)
    for (int64_t nth = 0; nth < count; ++nth) {
      const auto& [entry, grad] = active_[nth];
      entry->count_write();
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
      if (entry.stepped && entry.has(Entry::kMaster)) entry.known = entry.writes();
    }
  }

 private:
  using Found = Entry::Found;

  // Tensor objects lie anywhere, and a step's data pushes them out of the caches: several threads wait less than one.
  static constexpr int64_t kManyTensors = 500;

  template <class GradientOf>
  int64_t gather_each(const GradientOf& gradient_of) {
    order_ = ElementOrder(device_);
    const int64_t count = entries_.size();
    spans_.resize(count);
    active_.resize(count);
    std::vector<Found> found(count);
    std::vector<const Tensor*> grads(count);
#pragma omp parallel for if (count > kManyTensors)
    for (int64_t i = 0; i < count; ++i) {
      const Tensor* grad = grads[i] = gradient_of(i);
      found[i] = grad ? entries_[i].glance(*grad, device_, spans_[i]) : Found::kUnseen;
    }
    if (std::find(found.begin(), found.end(), Found::kUnseen) != found.end()) return release(), kUnseen;
    try {
      Spans written;  // past their masters
      int64_t kept = 0;
      for (int64_t i = 0; i < count; ++i) {
        Entry& entry = entries_[i];
        if (found[i] == Found::kNothing) continue;
        if (found[i] == Found::kStale) return release(), kStale;
        spans_[kept] = found[i] == Found::kReady ? spans_[i] : look(entry, *grads[i]);
        if (entry.has(Entry::kMaster) && entry.writes() != entry.known) written.push_back(spans_[kept]);
        active_[kept++] = {&entry, grads[i]};
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
    const Tensor param = entry.tensor();
    Span span = {};
    bool grouped = false;
    for (int k = 0; k < info_.moments; ++k) {
      span.moment_dtype[k] = moment_dtype(entry.held(Entry::kMoment + k));
      grouped |= is_grouped(span.moment_dtype[k]);
    }
    TORCH_CHECK(!grouped || entry.has(Entry::kStep), "deepfast: moments in 8 bits need step counts");
    order_.follow(param);
    const size_t copies = order_.copies();
    span.param_dtype = entry.dtype;
    span.group = entry.group;
    span.seed = entry.seed;
    span.first = entry.first;
    span.rounding = entry.rounding;
    span.numel = param.numel();
    span.param = order_.write(param, "a parameter");
    if (entry.has(Entry::kMaster)) {
      const Tensor master = entry.held(Entry::kMaster);
      span.master_dtype = master_dtype(master, span.param_dtype);
      span.master = order_.write(master, "a master");
    }
    if (entry.has(Entry::kStep)) span.step = fp32_values(entry.held(Entry::kStep), 1, "a step count", device_);
    for (int k = 0; k < info_.moments; ++k) {
      const Tensor moment = entry.held(Entry::kMoment + k);
      span.moment[k] = is_grouped(span.moment_dtype[k]) ? grouped_values(moment, span.numel, device_)
                                                        : order_.write(moment, "a moment");
    }
    entry.note(span, order_.copies() == copies);
    span.grad = after_ != Afterwards::kKept ? order_.write(grad, "a gradient") : order_.read(grad, "a gradient");
    span.grad_dtype = dtype_of(grad, "a gradient");
    return span;
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
  std::vector<int64_t> sinks_;
  std::vector<Entry> entries_;
  at::Device device_;
  Backend backend_;

  Slots slots_;

  // From `gather` to the end of `step`.
  Afterwards after_ = Afterwards::kKept;
  std::vector<Tensor> given_;
  Spans spans_;                                           // of the parameters that have a gradient,
  std::vector<std::pair<Entry*, const Tensor*>> active_;  // which one each is, and its gradient
  ElementOrder order_;
};

}  // namespace deepfast::bindings
