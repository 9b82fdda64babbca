// Collectives over tensors: contiguous or not, on this host or over several.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <mutex>
#include <optional>

#include "../cpu/collectives.h"
#include "../cpu/kernels.h"
#include "../cpu/owners.h"
#include "elements.h"
#include "heap.h"
#include "hosts.h"

namespace deepfast::bindings {

class Communicator {
 public:
  // rank: in the whole group; hosts: null where all ranks share this one.
  Communicator(int rank, int ranks, std::shared_ptr<Peers> peers, std::shared_ptr<Hosts> hosts)
      : rank_(rank), ranks_(ranks), peers_(std::move(peers)), hosts_(std::move(hosts)), heap_(new Heap(peers_)) {}

  Peers& peers() { return *peers_; }
  int ranks() const { return ranks_; }
  Tensor empty(int64_t numel, at::ScalarType dtype) { return heap_->empty(numel, dtype); }

  // found_inf: fp32, set to 1 where the result is not finite. statistics: fp64 [2].
  void all_reduce(Tensor t, double factor, const std::optional<Tensor>& statistics,
                  const std::optional<Tensor>& found_inf) {
    const Element type = type_of(t);
    check_factor(type, factor);
    run([&] {
      Statistics found = {};
      Statistics* wanted = statistics || (found_inf && type <= Element::kBFloat16) ? &found : nullptr;
      if (!hosts_) {
        Tensor data = t.contiguous();
        cpu::all_reduce(*peers_, data.mutable_data_ptr(), data.numel(), {type, type, factor, wanted});
        if (!data.is_same(t)) t.copy_(data);
      } else {
        t.copy_(summed(t, factor));
        if (wanted) found = statistics_of(t);
      }
      t.unsafeGetTensorImpl()->bump_version();
      tell(t, found, statistics, found_inf);
    });
  }

  // t: [ranks, ...] -> out: [...], this rank's part of the sum; out may be a float of another width.
  void reduce_scatter(Tensor out, const Tensor& t, double factor, const std::optional<Tensor>& statistics,
                      const std::optional<Tensor>& found_inf) {
    const Element type = type_of(t), out_type = type_of(out);
    check_factor(type, factor);
    check_pair(t, out, "reduce_scatter");
    run([&] {
      Statistics found = {};
      Statistics* wanted = statistics || (found_inf && out_type <= Element::kBFloat16) ? &found : nullptr;
      Tensor data = out.contiguous();
      const Tensor in = t.contiguous();
      if (!hosts_) {
        cpu::reduce_scatter(*peers_, in.const_data_ptr(), data.mutable_data_ptr(), data.numel(),
                            {type, out_type, factor, wanted});
      } else {
        data.view(-1).copy_(summed(in, factor).view({ranks_, -1})[rank_]);
        if (wanted) found = statistics_of(data);
      }
      if (!data.is_same(out)) out.copy_(data);
      out.unsafeGetTensorImpl()->bump_version();
      tell(out, found, statistics, found_inf);
    });
  }

  // t: [...] -> out: [ranks, ...] in rank order; out may be a float of another width.
  void all_gather(Tensor out, const Tensor& t) {
    const Element type = type_of(t), out_type = type_of(out);
    check_pair(out, t, "all_gather");
    run([&] {
      Tensor data = out.contiguous();
      const Tensor in = t.contiguous();
      if (!hosts_) {
        cpu::all_gather(*peers_, in.const_data_ptr(), data.mutable_data_ptr(), in.numel(), type, out_type);
      } else {
        // Every rank's bytes beside zeros: their sum is exact.
        Tensor all = at::zeros({ranks_, in.numel() * in.element_size()}, at::kByte);
        std::memcpy(static_cast<char*>(all[rank_].mutable_data_ptr()), in.const_data_ptr(), all.size(1));
        all = summed_bytes(all);
        data.view(-1).copy_(at::from_blob(all.mutable_data_ptr(), {ranks_ * in.numel()}, in.options()));
      }
      if (!data.is_same(out)) out.copy_(data);
      out.unsafeGetTensorImpl()->bump_version();
    });
  }

  // grads: of a bucket's parameters, each beginning at its offset (elements), none where there is none. dtype: what
  // they are if they are nothing else. sum: fp32, this rank's chunk of the bucket; or the whole bucket in the heap, and
  // then every rank gets it whole. (csrc/cpu/owners.h)
  void add_to_owners(Tensor sum, const std::vector<std::optional<Tensor>>& grads, const std::vector<int64_t>& offsets,
                     int64_t numel, int64_t chunk, at::ScalarType dtype, double weight, bool overwrite, bool everywhere,
                     const std::optional<Tensor>& statistics) {
    TORCH_CHECK(!hosts_, "deepfast: the ranks do not share a host");
    TORCH_CHECK(grads.size() == offsets.size(), "deepfast: ", offsets.size(), " gradients expected, got ",
                grads.size());
    TORCH_CHECK(chunk >= 0 && chunk % kReadBlock == 0 && chunk * ranks_ >= numel, "deepfast: no chunk of ", numel,
                " elements for ", ranks_, " ranks: ", chunk);
    const int64_t begin = std::min(chunk * rank_, numel), mine = std::min(chunk, numel - begin);
    TORCH_CHECK(sum.scalar_type() == at::kFloat && sum.is_contiguous() && sum.numel() == (everywhere ? numel : mine),
                "deepfast: the sum must be ", everywhere ? numel : mine, " contiguous float32 values");
    std::optional<Element> in = element_type(dtype);
    std::vector<cpu::Segment> segments;
    int64_t end = 0;
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i]) continue;
      const Tensor& grad = *grads[i];
      const Element type = type_of(grad);
      TORCH_CHECK_TYPE(type <= Element::kBFloat16, "deepfast: a gradient has dtype ", grad.scalar_type());
      TORCH_CHECK(grad.is_non_overlapping_and_dense() && offsets[i] >= end && offsets[i] + grad.numel() <= numel,
                  "deepfast: a gradient does not lie in its bucket");
      if (type != in) in = Element::kFloat32;
      end = offsets[i] + grad.numel();
      segments.push_back({offsets[i], end, grad.const_data_ptr(), static_cast<DType>(type)});
    }
    if (!in || *in > Element::kBFloat16) in = Element::kFloat32;
    run([&] {
      Statistics found = {};
      cpu::add_to_owners(
          *peers_, segments, sum.mutable_data_ptr<float>() + (everywhere ? begin : 0),
          {*in, numel, chunk, static_cast<float>(weight), overwrite, everywhere, statistics ? &found : nullptr});
      sum.unsafeGetTensorImpl()->bump_version();
      tell(sum, found, statistics, std::nullopt);
    });
  }

  // Where this process sees each rank's `t`, which lies in memory from `empty`.
  std::vector<int64_t> addresses(const Tensor& t) {
    TORCH_CHECK(!hosts_, "deepfast: the ranks do not share a host");
    std::vector<int64_t> out;
    run([&] {
      peers_->begin({cpu::Announcement::kAddresses, Element::kInt32, Element::kInt32, static_cast<int64_t>(t.nbytes()),
                     1.0, false, peers_->heap_offset(t.const_data_ptr())});
      peers_->meet();
      peers_->check_agreement();
      TORCH_CHECK(peers_->all_in_heap(), "deepfast: a tensor lies in no shared memory");
      for (int r = 0; r < peers_->ranks(); ++r) {
        out.push_back(reinterpret_cast<int64_t>(peers_->heap(r) + peers_->said(r).offset));
      }
    });
    return out;
  }

  void close() { peers_->close(); }

 private:
  static Element type_of(const Tensor& t) {
    const auto type = element_type(t.scalar_type());
    TORCH_CHECK_TYPE(type && t.layout() == at::kStrided,
                     "deepfast: collectives take dense float32, float16, bfloat16, ", "float64, int32 and int64, not ",
                     t.layout(), " ", t.scalar_type());
    TORCH_CHECK(t.is_cpu(), "deepfast: this communicator is for tensors on a CPU, not on ", t.device());
    return *type;
  }

  static void check_factor(Element type, double factor) {
    TORCH_CHECK_TYPE(factor == 1.0 || type <= Element::kFloat64,
                     "deepfast: integers are summed, not scaled or averaged");
  }

  void check_pair(const Tensor& whole, const Tensor& part, const char* what) const {
    TORCH_CHECK(whole.numel() == ranks_ * part.numel(), "deepfast: ", what, ": one tensor must have ", ranks_,
                " times the other's elements, got ", whole.numel(), " and ", part.numel());
    const bool floats = *element_type(whole.scalar_type()) <= Element::kBFloat16 &&
                        *element_type(part.scalar_type()) <= Element::kBFloat16;
    TORCH_CHECK_TYPE(floats || whole.scalar_type() == part.scalar_type(), "deepfast: ", what, " cannot turn ",
                     whole.scalar_type(), " into ", part.scalar_type());
  }

  static Statistics statistics_of(const Tensor& t) {
    const Tensor data = t.contiguous();
    Span span = {};
    span.grad = data.mutable_data_ptr();
    span.grad_dtype = static_cast<DType>(type_of(t));
    span.numel = data.numel();
    return cpu::statistics(&span, 1);
  }

  static void tell(const Tensor& result, const Statistics& found, const std::optional<Tensor>& statistics,
                   const std::optional<Tensor>& found_inf) {
    if (statistics) {
      TORCH_CHECK(statistics->scalar_type() == at::kDouble && statistics->numel() == 2 && statistics->is_contiguous(),
                  "deepfast: statistics must be 2 contiguous float64 values");
      std::memcpy(statistics->mutable_data_ptr(), &found, sizeof found);
    }
    if (!found_inf) return;
    const bool wide = result.scalar_type() == at::kDouble;
    if (wide ? !at::isfinite(result).all().item<bool>() : found.non_finite > 0) found_inf->fill_(1);
  }

  // Over all hosts: reduced on each (in fp32, where t is 16 bits wide), then once between them, then shown to all.
  Tensor summed(const Tensor& t, double factor) {
    const Tensor in = t.contiguous();
    Tensor wide = in.element_size() == 2 ? in.to(at::kFloat) : in.clone();
    const Element type = type_of(wide);
    cpu::all_reduce(*peers_, wide.mutable_data_ptr(), wide.numel(), {type, type, factor, nullptr});
    return over_hosts(wide);
  }

  Tensor summed_bytes(Tensor t) {
    // Disjoint, so integers of any width do; four bytes at a time.
    Tensor words = at::zeros({(t.numel() + 3) / 4}, at::kInt);
    std::memcpy(words.mutable_data_ptr(), t.const_data_ptr(), t.numel());
    cpu::all_reduce(*peers_, words.mutable_data_ptr(), words.numel(), {Element::kInt32, Element::kInt32, 1.0, nullptr});
    return over_hosts(words);
  }

  Tensor over_hosts(Tensor t) {
    if (hosts_->leads()) hosts_->add(*peers_, t);
    cpu::broadcast(*peers_, t.mutable_data_ptr(), t.nbytes(), 0);
    return t;
  }

  // One operation at a time. Whom this host has missed, the others are told.
  template <class Body>
  void run(const Body& body) {
    const std::lock_guard lock(mutex_);
    const at::NoGradGuard no_grad;
    try {
      body();
    } catch (const Missing& missing) {
      if (hosts_) hosts_->report(missing.ranks);
      throw;
    }
  }

  const int64_t rank_, ranks_;
  std::shared_ptr<Peers> peers_;
  std::shared_ptr<Hosts> hosts_;
  std::shared_ptr<Heap> heap_;
  std::mutex mutex_;
};

}  // namespace deepfast::bindings
