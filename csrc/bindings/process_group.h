// The backend of `init_process_group("deepfast")`: sums of gradients are ours, all else is gloo's or NCCL's.
#pragma once

#include <condition_variable>
#include <deque>

#include "communicator.h"

namespace deepfast::bindings {

using c10d::Backend;
using c10d::OpType;
using c10d::Work;

class Operation : public Work {
 public:
  // title, inputs: of the event that a profiler shows.
  Operation(int rank, OpType type, const char* title, const std::vector<Tensor>& inputs, std::vector<Tensor> results)
      : Work(rank, type, title, inputs),
        results_(std::move(results)),
        future_(c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()))) {}

  void run(const std::function<void()>& body) {
    try {
      body();
      future_->markCompleted(results_);
      finish();  // who has waited for this may ask the future
    } catch (...) {
      future_->setErrorIfNeeded(std::current_exception());
      finish(std::current_exception());
    }
  }

  std::vector<Tensor> result() override { return results_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

 private:
  std::vector<Tensor> results_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

class ProcessGroup : public Backend {
 public:
  // inner[device type]: the backends for what is not ours.
  ProcessGroup(int rank, int size, std::shared_ptr<Communicator> communicator, c10::intrusive_ptr<Backend> cpu,
               c10::intrusive_ptr<Backend> cuda)
      : Backend(rank, size), communicator_(std::move(communicator)), cpu_(std::move(cpu)), cuda_(std::move(cuda)) {
    thread_ = std::thread([this] { work_off(); });
  }

  ~ProcessGroup() override {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    communicator_->close();
    queued_.notify_all();
    thread_.join();
  }

  const std::string getBackendName() const override { return "deepfast"; }
  void setTimeout(std::chrono::milliseconds timeout) override {
    communicator_->peers().set_timeout(timeout);
    for (const auto& inner : {cpu_, cuda_}) {
      if (inner) inner->setTimeout(timeout);
    }
  }

  // DDP's and FSDP2's buckets then lie where all ranks see them.
  bool supportsTensorAlloc(c10::DeviceIndex) override { return !cuda_; }
  Tensor allocateTensor(long size, at::TensorOptions options) override {
    const auto type = c10::typeMetaToScalarType(options.dtype());
    if (!options.device().is_cpu() || !element_type(type)) return at::empty({size}, options);
    return communicator_->empty(size, type);
  }

  // Ours.

  c10::intrusive_ptr<Work> allreduce(std::vector<Tensor>& tensors, const c10d::AllreduceOptions& opts) override {
    if (tensors.size() != 1 || !ours(tensors[0], opts.reduceOp)) return of(tensors).allreduce(tensors, opts);
    const Tensor t = tensors[0];
    return enqueue(OpType::ALLREDUCE, "deepfast:all_reduce", t, {t}, opts.asyncOp,
                   [=, this, factor = factor(opts.reduceOp)] { communicator_->all_reduce(t, factor, {}, {}); });
  }

  c10::intrusive_ptr<Work> _reduce_scatter_base(Tensor& out, Tensor& in,
                                                const c10d::ReduceScatterOptions& opts) override {
    if (!ours(in, opts.reduceOp) || !ours(out, opts.reduceOp) || in.scalar_type() != out.scalar_type()) {
      return of({in})._reduce_scatter_base(out, in, opts);
    }
    return enqueue(OpType::_REDUCE_SCATTER_BASE, "deepfast:reduce_scatter_tensor", in, {out}, opts.asyncOp,
                   [=, this, out = out, in = in, factor = factor(opts.reduceOp)] {
                     communicator_->reduce_scatter(out, in, factor, {}, {});
                   });
  }

  c10::intrusive_ptr<Work> _allgather_base(Tensor& out, Tensor& in, const c10d::AllgatherOptions& opts) override {
    if (!ours(in, c10d::ReduceOp::SUM) || in.scalar_type() != out.scalar_type()) {
      return of({in})._allgather_base(out, in, opts);
    }
    return enqueue(OpType::_ALLGATHER_BASE, "deepfast:all_gather_into_tensor", in, {out}, opts.asyncOp,
                   [=, this, out = out, in = in] { communicator_->all_gather(out, in); });
  }

  // Not ours.

#define DEEPFAST_FORWARD(name, Options)                                                       \
  c10::intrusive_ptr<Work> name(std::vector<Tensor>& a, const c10d::Options& opts) override { \
    return of(a).name(a, opts);                                                               \
  }
  DEEPFAST_FORWARD(broadcast, BroadcastOptions)
  DEEPFAST_FORWARD(allreduce_sparse, AllreduceOptions)
  DEEPFAST_FORWARD(allreduce_coalesced, AllreduceCoalescedOptions)
  DEEPFAST_FORWARD(reduce, ReduceOptions)
#undef DEEPFAST_FORWARD

  using Lists = std::vector<std::vector<Tensor>>;
  c10::intrusive_ptr<Work> allgather(Lists& out, std::vector<Tensor>& in, const c10d::AllgatherOptions& o) override {
    return of(in).allgather(out, in, o);
  }
  c10::intrusive_ptr<Work> allgather_coalesced(Lists& out, std::vector<Tensor>& in,
                                               const c10d::AllgatherOptions& o) override {
    return of(in).allgather_coalesced(out, in, o);
  }
  c10::intrusive_ptr<Work> allgather_into_tensor_coalesced(std::vector<Tensor>& out, std::vector<Tensor>& in,
                                                           const c10d::AllgatherOptions& o) override {
    return of(in).allgather_into_tensor_coalesced(out, in, o);
  }
  c10::intrusive_ptr<Work> gather(Lists& out, std::vector<Tensor>& in, const c10d::GatherOptions& o) override {
    return of(in).gather(out, in, o);
  }
  c10::intrusive_ptr<Work> scatter(std::vector<Tensor>& out, Lists& in, const c10d::ScatterOptions& o) override {
    return of(out).scatter(out, in, o);
  }
  c10::intrusive_ptr<Work> reduce_scatter(std::vector<Tensor>& out, Lists& in,
                                          const c10d::ReduceScatterOptions& o) override {
    return of(out).reduce_scatter(out, in, o);
  }
  c10::intrusive_ptr<Work> reduce_scatter_tensor_coalesced(std::vector<Tensor>& out, std::vector<Tensor>& in,
                                                           const c10d::ReduceScatterOptions& o) override {
    return of(in).reduce_scatter_tensor_coalesced(out, in, o);
  }
  c10::intrusive_ptr<Work> alltoall_base(Tensor& out, Tensor& in, std::vector<int64_t>& out_sizes,
                                         std::vector<int64_t>& in_sizes, const c10d::AllToAllOptions& o) override {
    return of({in}).alltoall_base(out, in, out_sizes, in_sizes, o);
  }
  c10::intrusive_ptr<Work> alltoall(std::vector<Tensor>& out, std::vector<Tensor>& in,
                                    const c10d::AllToAllOptions& o) override {
    return of(in).alltoall(out, in, o);
  }
  c10::intrusive_ptr<Work> send(std::vector<Tensor>& t, int to, int tag) override { return of(t).send(t, to, tag); }
  c10::intrusive_ptr<Work> recv(std::vector<Tensor>& t, int from, int tag) override { return of(t).recv(t, from, tag); }
  c10::intrusive_ptr<Work> recvAnysource(std::vector<Tensor>& t, int tag) override {
    return of(t).recvAnysource(t, tag);
  }
  c10::intrusive_ptr<Work> barrier(const c10d::BarrierOptions& opts) override {
    return (cuda_ ? cuda_ : cpu_)->barrier(opts);
  }
  void monitoredBarrier(const c10d::BarrierOptions& opts, bool wait_all_ranks) override {
    cpu_->monitoredBarrier(opts, wait_all_ranks);
  }
  void setSequenceNumberForGroup() override { cpu_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return cpu_->getSequenceNumberForGroup(); }

 private:
  static bool ours(const Tensor& t, const c10d::ReduceOp& op) {
    if (!t.is_cpu() || t.layout() != at::kStrided || !element_type(t.scalar_type())) return false;
    return op == c10d::ReduceOp::SUM || (op == c10d::ReduceOp::AVG && t.is_floating_point());
  }

  double factor(const c10d::ReduceOp& op) const { return op == c10d::ReduceOp::AVG ? 1.0 / getSize() : 1.0; }

  Backend& of(const std::vector<Tensor>& tensors) {
    return cuda_ && !tensors.empty() && tensors[0].is_cuda() ? *cuda_ : *cpu_;
  }

  // Operations run in the order of their calls, on a thread of their own; one that is waited for at once, and has none
  // before it, on the caller's.
  c10::intrusive_ptr<Work> enqueue(OpType type, const char* title, const Tensor& input, std::vector<Tensor> results,
                                   bool async, std::function<void()> body) {
    auto operation =
        c10::make_intrusive<Operation>(getRank(), type, title, std::vector<Tensor>{input}, std::move(results));
    {
      std::unique_lock lock(mutex_);
      if (async || busy_ || !queue_.empty()) {
        queue_.emplace_back(operation, std::move(body));
        lock.unlock();
        queued_.notify_one();
        return operation;
      }
      busy_ = true;
    }
    operation->run(body);
    {
      const std::lock_guard lock(mutex_);
      busy_ = false;
    }
    queued_.notify_one();
    return operation;
  }

  void work_off() {
    std::unique_lock lock(mutex_);
    while (true) {
      queued_.wait(lock, [this] { return !busy_ && (ending_ || !queue_.empty()); });
      if (queue_.empty()) return;
      auto [operation, body] = std::move(queue_.front());
      queue_.pop_front();
      busy_ = true;
      lock.unlock();
      operation->run(body);
      operation.reset();
      body = nullptr;
      lock.lock();
      busy_ = false;
    }
  }

  std::shared_ptr<Communicator> communicator_;
  c10::intrusive_ptr<Backend> cpu_, cuda_;
  std::mutex mutex_;
  std::condition_variable queued_;
  std::deque<std::pair<c10::intrusive_ptr<Operation>, std::function<void()>>> queue_;
  bool busy_ = false, ending_ = false;
  std::thread thread_;
};

}  // namespace deepfast::bindings
