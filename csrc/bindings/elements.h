// What collectives move, in torch's words.
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>

#include "../math/collective.h"

namespace deepfast::bindings {

inline std::optional<Element> element_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kHalf:
      return Element::kFloat16;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kDouble:
      return Element::kFloat64;
    case at::kInt:
      return Element::kInt32;
    case at::kLong:
      return Element::kInt64;
    default:
      return std::nullopt;
  }
}

}  // namespace deepfast::bindings
