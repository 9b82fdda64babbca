// Tensors of any layout, brought into one element order.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include <deque>
#include <utility>
#include <vector>

namespace deepfast::bindings {

using at::Tensor;

// A tensor that lies in another order than its parameter is copied, and what a kernel writes into the copy is copied
// back: a transposed gradient or a strided parameter is slower, never wrong.
class ElementOrder {
 public:
  explicit ElementOrder(at::Device device) : device_(device) {}

  // From here on, the order of `param`: its own where it is dense in memory, else the contiguous one. `param` stays.
  void follow(const Tensor& param) {
    sizes_ = param.sizes();
    strides_ = param.strides();
    if (!param.is_contiguous() && !param.is_non_overlapping_and_dense()) {
      copies_.push_back(param.new_empty(sizes_));
      strides_ = copies_.back().strides();
    }
  }

  void* read(const Tensor& t, const char* what) {
    TORCH_CHECK(t.device() == device_ && t.layout() == at::kStrided, "deepfast: ", what, " must be a dense tensor on ",
                device_, ", got ", t.layout(), " on ", t.device());
    TORCH_CHECK(t.sizes() == sizes_, "deepfast: ", what, " has shape ", t.sizes(), ", its parameter ", sizes_);
    if (t.strides() == strides_ || t.numel() == 0) return t.data_ptr();
    copies_.push_back(t.new_empty_strided(sizes_, strides_).copy_(t));
    return copies_.back().data_ptr();
  }

  void* write(const Tensor& t, const char* what) {
    const size_t before = copies_.size();
    if (!t.is_contiguous()) {
      TORCH_CHECK(at::has_internal_overlap(t) != at::MemOverlap::Yes, "deepfast: ", what, " of shape ", t.sizes(),
                  " is written to, but has elements that share memory (an expanded view?): clone() it");
    }
    void* data = read(t, what);
    if (copies_.size() > before) written_.emplace_back(t, copies_.back());
    return data;
  }

  size_t copies() const { return copies_.size(); }

  void write_back() const {
    for (const auto& [original, copy] : written_) original.copy_(copy);
  }

 private:
  at::Device device_;
  at::IntArrayRef sizes_, strides_;
  std::deque<Tensor> copies_;  // strides_ may point into one
  std::vector<std::pair<Tensor, Tensor>> written_;
};

}  // namespace deepfast::bindings
