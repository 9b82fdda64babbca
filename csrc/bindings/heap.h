// Shared memory as tensors.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <mutex>

#include "../cpu/peers.h"

namespace deepfast::bindings {

using at::Tensor;
using cpu::Peers;

// This rank's heap, handed out: the first gap that is large enough. Pages that have come back stay for the next.
class Heap : public std::enable_shared_from_this<Heap> {
 public:
  explicit Heap(std::shared_ptr<Peers> peers) : peers_(std::move(peers)) {
    if (peers_->heap_bytes() > 0) gaps_[0] = peers_->heap_bytes();
  }

  Tensor empty(int64_t numel, at::ScalarType dtype) {
    const auto options = at::TensorOptions().dtype(dtype);
    const int64_t bytes = std::max<int64_t>(1, (numel * c10::elementSize(dtype) + kAlign - 1) / kAlign) * kAlign;
    const int64_t offset = take(bytes);
    char* data = peers_->heap(peers_->rank()) + offset;
    return at::from_blob(
        data, {numel}, [self = shared_from_this(), offset, bytes](void*) { self->give_back(offset, bytes); }, options);
  }

 private:
  static constexpr int64_t kAlign = 4096;

  int64_t take(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    for (auto gap = gaps_.begin(); gap != gaps_.end(); ++gap) {
      const auto [offset, size] = *gap;
      if (size < bytes) continue;
      gaps_.erase(gap);
      if (size > bytes) gaps_[offset + bytes] = size - bytes;
      return offset;
    }
    TORCH_CHECK(false, "deepfast: no ", bytes, " bytes left of the communicator's ", peers_->heap_bytes(),
                " of shared memory: free tensors that empty() has given, or make fewer");
  }

  void give_back(int64_t offset, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    auto gap = gaps_.emplace(offset, bytes).first;
    if (const auto next = std::next(gap); next != gaps_.end() && gap->first + gap->second == next->first) {
      gap->second += next->second;
      gaps_.erase(next);
    }
    if (gap == gaps_.begin()) return;
    const auto before = std::prev(gap);
    if (before->first + before->second == gap->first) {
      before->second += gap->second;
      gaps_.erase(gap);
    }
  }

  std::shared_ptr<Peers> peers_;
  std::mutex mutex_;
  std::map<int64_t, int64_t> gaps_;  // offset -> bytes
};

}  // namespace deepfast::bindings
