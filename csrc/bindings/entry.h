// A parameter of a plan and its state: held without being kept alive, looked at once, and glanced at from then on.
#pragma once

#include <optional>

#include "tensors.h"

namespace deepfast::bindings {

// Autograd's count of writes.
inline int64_t version(at::TensorImpl& t) { return t.is_inference() ? 0 : t.version_counter().current_version(); }

// Where its first element lies.
inline const void* place(const at::TensorImpl& t) {
  if (!t.unsafe_storage()) return nullptr;
  const auto* data = static_cast<const char*>(t.unsafe_storage().unsafeGetStorageImpl()->data());
  return data + t.storage_offset() * t.itemsize();
}

inline bool same_order(const at::TensorImpl& t, const at::TensorImpl& param) {
  return t.sizes() == param.sizes() && t.strides() == param.strides();
}

// A tensor whose Python object somebody else keeps.
class Seen {
 public:
  explicit Seen(const Tensor& t) : impl(t.unsafeGetTensorImpl()) {
    const auto* words = static_cast<const void* const*>(object());
    for (int word = 2; words && word < 5 && !holder_; ++word) {
      if (words[word] == impl) holder_ = words + word;
    }
    if (!holder_) kept_ = t;
  }

  bool held() const { return holder_; }

  // Whether its object is still this one, and has not been exchanged for another.
  bool there() const { return !holder_ || *holder_ == impl; }

  const void* object() const { return impl->pyobj_slot()->load_pyobj(); }

  // The tensor that another object holds. (That, not one more reference to it, which may have to wait for Python.)
  const Tensor* tensor_of(const void* other) const {
    const auto word = holder_ - static_cast<const void* const*>(object());
    return reinterpret_cast<const Tensor*>(static_cast<const void* const*>(other) + word);
  }

  at::TensorImpl* impl;

 private:
  // The word of its Python object that points to it: behind the object's head (two words), where exactly differs from
  // torch to torch. (Even a weak reference would keep torch from exchanging what it points to.)
  const void* const* holder_ = nullptr;
  Tensor kept_;  // if it has none
};

// Who moves state away wants its memory back, and torch exchanges no parameter that somebody else refers to, too
// (torch.utils.swap_tensors). Who makes a plan holds the parameters' Python objects.
class Entry {
 public:
  enum Slot { kMaster, kStep, kMoment, kSlots = kMoment + kMaxMoments };
  static constexpr int64_t kUnknown = -1;

  Entry(const Tensor& param, int32_t group)
      : param(param.unsafeGetTensorImpl()),
        dtype(dtype_of(param, "a parameter")),
        group(group),
        own_(param),
        place_(bindings::place(*this->param)) {}

  void keep(int slot, const Tensor& t) { state_[slot] = t.getIntrusivePtr(); }

  bool has(int slot) const { return state_[slot]._unsafe_get_target() != c10::UndefinedTensorImpl::singleton(); }

  // The state tensor, which the optimizer's state dictionary must still hold.
  Tensor held(int slot) const {
    Tensor t(state_[slot].lock());
    TORCH_CHECK(t.defined(), "deepfast: a tensor of the optimizer's state is gone");
    return t;
  }

  // The parameter, unless it has been exchanged for another.
  at::TensorImpl* there() const { return own_.there() && (!whole || whole->there()) ? param : nullptr; }

  // Autograd's counts of writes to it, and to the DTensor that it is a shard of.
  int64_t writes() const { return bindings::version(*param) + (whole ? bindings::version(*whole->impl) : 0); }

  // What a step has written to it, both.
  void count_write() const {
    written(*param);
    if (whole) written(*whole->impl);
  }

  // The parameter as a tensor; not where it has been exchanged.
  Tensor tensor() const {
    return Tensor(c10::intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(param));
  }

  // What a glance at the parameter and its gradient tells. Mostly kReady: all as in the last step but the gradient's
  // place.
  enum class Found : uint8_t { kNothing, kReady, kOther, kStale, kUnseen };

  // span: filled where all is ready.
  Found glance(const Tensor& grad, at::Device device, Span& span) {
    stepped = false;
    const at::TensorImpl* p = there();
    if (!p || p->device() != device || bindings::place(*p) != place_ ||
        kernel_dtype(c10::typeMetaToScalarType(p->dtype())) != dtype) {
      return Found::kStale;
    }
    if (!grad.defined()) return Found::kNothing;
    if (!plain(grad, device)) return Found::kStale;
    if (looked_ && p->strides() != strides_) return Found::kStale;  // Python lays its state anew
    if (!looked_ || p->numel() != span_.numel || !same_order(*grad.unsafeGetTensorImpl(), *p) || !unmoved(*p)) {
      return Found::kOther;
    }
    span = span_;
    span.grad = grad.data_ptr();
    span.grad_dtype = *kernel_dtype(grad.scalar_type());
    return Found::kReady;
  }

  // What somebody has found who looked: `found`, but for the gradient. lasting: valid as long as nothing moves.
  void note(const Span& found, bool lasting) {
    looked_ = lasting;
    span_ = found;
    strides_ = param->strides();
    for (int slot = 0; slot < kSlots; ++slot) {
      if (has(slot)) places_[slot] = bindings::place(*state_[slot]._unsafe_get_target());
    }
  }

  void round_by_chance(int64_t of_parameter, int64_t begin, bool weight) {
    seed = static_cast<uint64_t>(of_parameter);
    first = begin;
    rounding = weight ? Rounding::kStochastic : Rounding::kNearest;
    looked_ = false;
  }

  at::TensorImpl* param;
  DType dtype;
  int32_t group;
  uint64_t seed = 0;
  int64_t first = 0;
  Rounding rounding = Rounding::kNearest;
  std::optional<Seen> whole;       // the DTensor that the parameter is this rank's shard of
  const void* expected = nullptr;  // how that one's gradient lies if it lies as it does (dtensor.h)
  int64_t known = kUnknown;        // writes when the master was last right
  bool stepped = false;            // since the last `gather`

 private:
  using Weak = c10::weak_intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>;

  static Weak none() { return Weak(Tensor().getIntrusivePtr()); }

  static bool plain(const Tensor& t, at::Device device) {
    return t.layout() == at::kStrided && t.device() == device && kernel_dtype(t.scalar_type()) && !t.is_neg() &&
           !t.key_set().has(c10::DispatchKey::Python);
  }

  // Whether the state is where it was noted. Somebody may have given it other memory (`.data =`, share_memory_).
  bool unmoved(const at::TensorImpl& p) const {
    for (int slot = 0; slot < kSlots; ++slot) {
      if (!has(slot)) continue;
      const at::TensorImpl& t = *state_[slot]._unsafe_get_target();  // its memory is there, if nothing else
      if (state_[slot].use_count() == 0 || bindings::place(t) != places_[slot]) return false;
      const bool grouped = slot >= kMoment && is_grouped(span_.moment_dtype[slot - kMoment]);
      if (slot != kStep && !grouped && !same_order(t, p)) return false;
    }
    return true;
  }

  Seen own_;
  const void* place_;
  Weak state_[kSlots] = {none(), none(), none(), none(), none()};
  static_assert(kSlots == 5);

  // Noted.
  bool looked_ = false;
  Span span_;
  at::DimVector strides_;
  const void* places_[kSlots];
};

}  // namespace deepfast::bindings
