// The ranks of one host as one of them sees the others: their memory, who has arrived where, who is still there.
//
// Every rank owns one anonymous file (memfd) that all have mapped; it has no name, so nothing is left behind, and the
// size of /dev/shm does not matter. A rank that holds the (POSIX) lock on its file is alive: the kernel drops such a
// lock with the process, whatever ends it, and a forked child does not inherit it. Nothing here knows of torch.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "../math/collective.h"

namespace deepfast::cpu {

// Some ranks did not come: their names, as the whole group knows them.
struct Missing : std::runtime_error {
  Missing(const std::string& what, std::vector<int> ranks) : std::runtime_error(what), ranks(std::move(ranks)) {}
  std::vector<int> ranks;
};

// What a rank is about to do. All must say the same, but for where their tensor lies.
struct Announcement {
  enum Kind : int32_t { kAllReduce, kReduceScatter, kAllGather, kBroadcast, kAddToOwners, kAddresses };
  Kind kind;
  Element in, out;
  int64_t numel;
  double factor;
  bool measured;        // whether statistics are asked for
  int64_t offset;       // of the input in the rank's heap, in bytes; < 0: it lies elsewhere
  float weight = 1.0f;  // of this rank's, where each may have its own

  bool fits(const Announcement& other) const {
    return kind == other.kind && in == other.in && out == other.out && numel == other.numel && factor == other.factor &&
           measured == other.measured;
  }
};

// A count that one rank raises and others wait for.
struct alignas(64) Flag {
  std::atomic<uint32_t> value, waiting;

  bool reached(uint32_t target) const {
    return static_cast<int32_t>(value.load(std::memory_order_acquire) - target) >= 0;
  }
  void raise(uint32_t to);  // what was written before is seen by whoever sees `to`
  void wake();              // those who wait, to look around
  void sleep(uint32_t target, std::chrono::nanoseconds at_most);  // until it is reached, or woken
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);

// The first page of a rank's file.
struct Control {
  enum State : uint32_t { kOpen, kClosed, kBroken };
  Flag phase;
  std::atomic<uint32_t> state;
  std::atomic<uint32_t> elsewhere;  // 1: waiting for other hosts, and it will say so itself if they do not come
  int32_t missing[kMaxRanks];       // where kBroken: the names of those it has missed, and their number
  int32_t missed;
  Announcement said[2];  // of even and odd operations
};

class Peers {
 public:
  static constexpr int64_t kStage = 4 << 20;          // bytes, each of two
  static constexpr int64_t kSums = int64_t{1} << 23;  // blocks of statistics: one operation's
  static constexpr int64_t kStageAt = 4096;           // offsets in a rank's file
  static constexpr int64_t kSumsAt = kStageAt + 2 * kStage;
  static constexpr int64_t kHeapAt = kSumsAt + kSums * sizeof(double);

  // fds[ranks]: the files of all, each locked by its owner; they are this object's from now on. names[ranks]: what the
  // whole group calls them. heap: bytes that each file has beyond kHeapAt.
  Peers(int rank, std::vector<int> fds, std::vector<int> names, int64_t heap, std::chrono::nanoseconds timeout);
  ~Peers();
  Peers(const Peers&) = delete;

  int rank() const { return rank_; }
  int ranks() const { return static_cast<int>(fds_.size()); }
  int name(int rank) const { return names_[rank]; }
  char* stage(int rank, int slot) const { return base_[rank] + kStageAt + slot * kStage; }
  double* sums() const { return reinterpret_cast<double*>(base_[0] + kSumsAt); }  // [kSums], the same for all
  char* heap(int rank);                                                           // mapped when it is first asked for
  int64_t heap_offset(const void* data) const;  // of memory in this rank's own heap; -1 for any other
  int64_t heap_bytes() const { return heap_; }

  // One operation: what this rank is about to do. Returns the slot (0 or 1) of the staging memory that is its own now.
  int begin(const Announcement& announcement);
  // Says that this rank has come so far, and waits until all have. Throws Missing; the object is broken then.
  void meet();
  // After the first meeting. Throws where not all have announced the same.
  void check_agreement();
  bool all_in_heap() const;
  const Announcement& said(int rank) const { return control(rank).said[operation_ % 2]; }
  // In between, this rank waits for other hosts: the others of this one go on waiting for it.
  void wait_elsewhere(bool waits) { control(rank_).elsewhere.store(waits); }

  // Who has died or left, or whom another rank has missed, by name.
  std::vector<int> gone() const;
  // So that the others learn whom this rank has missed elsewhere. The object is broken then.
  void report(const std::string& why, const std::vector<int>& names) { mark_broken(why, names); }

  void set_timeout(std::chrono::nanoseconds timeout) { timeout_ = timeout; }
  std::chrono::nanoseconds timeout() const { return timeout_; }
  [[noreturn]] void fail(const std::string& why, const std::vector<int>& names);  // marks it broken, throws Missing
  void close();  // whoever waits for this rank from now on is told; own waits end
  // Called now and then while waiting; may throw.
  std::function<void()> look_up = [] {};

 private:
  Control& control(int rank) const { return *reinterpret_cast<Control*>(base_[rank]); }
  bool alive(int rank) const;
  void mark_broken(const std::string& what, const std::vector<int>& names);
  void check_usable() const;
  void wait_slowly(uint32_t target);
  std::vector<int> named(const std::vector<int>& ranks) const;

  const int rank_;
  const std::vector<int> fds_, names_;
  const int64_t heap_;
  const int process_;
  std::atomic<std::chrono::nanoseconds> timeout_;
  std::vector<char*> base_;
  std::unique_ptr<std::atomic<char*>[]> heaps_;
  std::mutex mapping_;
  uint32_t phase_ = 0;
  uint64_t operation_ = 0;
  int spins_;
  std::atomic<bool> closed_ = false;
  std::string broken_;
};

}  // namespace deepfast::cpu
