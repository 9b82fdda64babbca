// What only Python knows of a DTensor: this rank's shard of it, and how it lies over the ranks.
#pragma once

#include "entry.h"

namespace deepfast::bindings {

// Python keeps both in slots: words at fixed places in the object, which no interpreter has to be asked for. Where they
// are is seen at one DTensor of which all is known.
class Slots {
 public:
  Slots() = default;

  // All are addresses of Python objects: a DTensor, its class (of which an object has so many bytes), its shard and
  // its layout.
  Slots(const void* whole, const void* type, size_t bytes, const void* shard, const void* layout)
      : class_(type),
        type_(place_of(type, whole, 0, kHead)),
        shard_(place_of(shard, whole, kHead, bytes / sizeof(void*))),
        layout_(place_of(layout, whole, kHead, bytes / sizeof(void*))) {}

  // The gradient of a parameter that is a shard: that of its DTensor, an undefined tensor where that has none. Null
  // where this has to be looked at: the parameter is that DTensor's shard no more, or the gradient lies otherwise than
  // expected, or is still on its way (and so of a class of its own).
  const Tensor* find(const Entry& entry) const {
    if (!type_ || !shard_ || !layout_ || !entry.there() || !entry.whole->held()) return nullptr;
    const void* const own = entry.param->pyobj_slot()->load_pyobj();
    if (word(entry.whole->object(), shard_) != own) return nullptr;
    const Tensor& found = entry.whole->impl->grad();
    if (!found.defined()) return &found;
    const void* const object = found.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj();
    if (!object || word(object, type_) != class_ || word(object, layout_) != entry.expected) return nullptr;
    const void* const shard = word(object, shard_);
    return shard && word(shard, type_) == word(own, type_) ? entry.whole->tensor_of(shard) : nullptr;
  }

 private:
  static constexpr size_t kHead = 2;  // words that all objects have

  static const void* word(const void* object, size_t place) { return static_cast<const void* const*>(object)[place]; }

  // Which word of `object` holds `value`; 0 if none does (the first one never does).
  static size_t place_of(const void* value, const void* object, size_t begin, size_t end) {
    while (object && begin < end && word(object, begin) != value) ++begin;
    return object && begin < end ? begin : 0;
  }

  const void* class_ = nullptr;
  size_t type_ = 0, shard_ = 0, layout_ = 0;
};

}  // namespace deepfast::bindings
