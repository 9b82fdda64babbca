// Collectives over peer memory as an operator: one launch on the current stream. Who has which memory, and what is done
// with tensors that do not lie there, is deepfast/comm/gpus.py's affair.
#pragma once

#include <string>

#include "../cuda/collectives.h"
#include "cuda.h"
#include "elements.h"

namespace deepfast::bindings {

// kind: "all_reduce", "reduce_scatter" or "all_gather". shared, data: addresses, a rank each; the latter empty where
// the input lies elsewhere. status: int32, in pinned memory.
constexpr const char* kCollectiveSchema =
    "collective_(str kind, Tensor(a!) input, Tensor(b!) output, int[] shared, int[] data, int place, int rank, "
    "float factor, Tensor(c!)? statistics, Tensor(d!)? found_inf, Tensor(e!) status) -> ()";

inline void collective(const std::string& kind, const Tensor& input, const Tensor& output, at::IntArrayRef shared,
                       at::IntArrayRef data, int64_t place, int64_t rank, double factor,
                       const std::optional<Tensor>& statistics, const std::optional<Tensor>& found_inf,
                       const Tensor& status) {
  using cuda::Call;
  const std::string kinds[] = {"all_reduce", "reduce_scatter", "all_gather"};
  const auto known = std::find(std::begin(kinds), std::end(kinds), kind);
  TORCH_CHECK(known != std::end(kinds), "deepfast: no such collective: ", kind);
  const auto in = element_type(input.scalar_type()), out = element_type(output.scalar_type());
  TORCH_CHECK(in && out && input.is_contiguous() && output.is_contiguous(), "deepfast: ", kind,
              " takes contiguous float32, float16, bfloat16, float64, int32 and int64");
  check_device(output, input.device(), "the output");
  const int64_t ranks = shared.size();
  TORCH_CHECK(0 <= rank && rank < ranks && ranks <= cuda::kMaxPeers, "deepfast: rank ", rank, " of ", ranks);
  TORCH_CHECK(status.scalar_type() == at::kInt && status.nbytes() >= sizeof(cuda::Status), "deepfast: a short status");
  Call call = {};
  call.kind = static_cast<Call::Kind>(known - std::begin(kinds));
  call.in = *in;
  call.out = *out;
  call.rank = static_cast<int>(rank);
  call.ranks = static_cast<int>(ranks);
  call.input = input.const_data_ptr();
  call.output = static_cast<char*>(output.mutable_data_ptr());
  call.numel = std::min(input.numel(), output.numel());
  call.factor = factor;
  call.place = data.empty() ? -1 : place;
  for (int64_t r = 0; r < ranks; ++r) {
    call.shared[r] = reinterpret_cast<char*>(shared[r]);
    if (!data.empty()) call.data[r] = reinterpret_cast<char*>(data.at(r));
  }
  const bool in_place = call.kind == Call::kAllReduce;
  const int64_t more = call.kind == Call::kReduceScatter ? ranks : 1, most = call.kind == Call::kAllGather ? ranks : 1;
  TORCH_CHECK(input.numel() == more * call.numel && output.numel() == most * call.numel &&
                  (!in_place || call.input == call.output),
              "deepfast: ", kind, " of ", input.numel(), " elements into ", output.numel());
  TORCH_CHECK(!data.empty() || (in_place && static_cast<int64_t>(input.nbytes()) <= cuda::kOneShot), "deepfast: ", kind,
              " of so much needs its input in peer memory");
  if (statistics)
    call.statistics = reinterpret_cast<Statistics*>(fp64_values(*statistics, 2, "statistics", input.device()));
  if (found_inf) call.found_inf = fp32_values(*found_inf, 1, "found_inf", input.device());
  const int64_t blocks = (call.numel + kReadBlock - 1) / kReadBlock;
  TORCH_CHECK((!statistics && !found_inf) || (*out <= Element::kBFloat16 && blocks <= cuda::kSums),
              "deepfast: statistics are of fp32, fp16 and bf16, and of at most 2^31 elements");
  call.status = static_cast<cuda::Status*>(status.mutable_data_ptr());
  const c10::DeviceGuard guard(input.device());
  cuda::collective(&call, 1, cuda::kMeetings, current_stream(input.device()));
  for (const auto& t : {std::optional(output), statistics, found_inf}) {
    if (t) written(*t);
  }
}

// The most ranks; bytes of peer memory that each needs; bytes that an all-reduce takes from anywhere; multiprocessors
// that one operation's thread blocks fill.
inline std::vector<int64_t> peer_layout() {
  return {cuda::kMaxPeers, cuda::kPeerBytes, cuda::kOneShot, cuda::kProcessors};
}

inline void define_collectives(torch::Library& library) {
  library.def(kCollectiveSchema);
  library.def("peer_layout() -> int[]", &peer_layout);
}

}  // namespace deepfast::bindings
