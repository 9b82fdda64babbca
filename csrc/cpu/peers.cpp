#include "peers.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace deepfast::cpu {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// How many forks lead to this process: counted, for to ask the system who one is takes a tenth of a small sum.
int forks = 0;
const int counted = pthread_atfork(nullptr, nullptr, [] { ++forks; });

constexpr int kYield = 32;                   // spins between two offers of the processor
constexpr auto kLook = milliseconds(5);      // how often who waits looks whether the others still live
constexpr auto kGrace = milliseconds(5000);  // for a rank that waits for other hosts, after its own timeout

// std::atomic::wait does not wake another process: its futex is private to one.
void futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* timeout = nullptr) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, timeout, nullptr, 0);
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

std::system_error error(const char* what) { return {errno, std::generic_category(), std::string("deepfast: ") + what}; }

char* map(int fd, int64_t offset, int64_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, offset);
  if (at == MAP_FAILED) throw error("shared memory cannot be mapped");
  madvise(at, bytes, MADV_DONTDUMP);
  return static_cast<char*>(at);
}

int processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

std::string list(const std::vector<int>& ranks) {
  std::string text;
  for (int rank : ranks) text += (text.empty() ? "" : ", ") + std::to_string(rank);
  return text;
}

}  // namespace

void Flag::raise(uint32_t to) {
  // Sequentially consistent, both here and in sleep(): else the two could miss each other.
  value.store(to, std::memory_order_seq_cst);
  if (waiting.load(std::memory_order_seq_cst) != 0) wake();
}

void Flag::wake() { futex(value, FUTEX_WAKE, INT32_MAX); }

void Flag::sleep(uint32_t target, std::chrono::nanoseconds at_most) {
  waiting.fetch_add(1, std::memory_order_seq_cst);
  const uint32_t seen = value.load(std::memory_order_seq_cst);
  if (static_cast<int32_t>(seen - target) < 0) {
    const timespec time = {at_most.count() / 1000000000, at_most.count() % 1000000000};
    futex(value, FUTEX_WAIT, seen, &time);
  }
  waiting.fetch_sub(1, std::memory_order_seq_cst);  // killed in between: it costs the others a system call a time
}

Peers::Peers(int rank, std::vector<int> fds, std::vector<int> names, int64_t heap, std::chrono::nanoseconds timeout)
    : rank_(rank),
      fds_(std::move(fds)),
      names_(std::move(names)),
      heap_(heap),
      process_(forks),
      timeout_(timeout),
      heaps_(new std::atomic<char*>[fds_.size()]()) {
  for (int fd : fds_) base_.push_back(map(fd, 0, kHeapAt));
  // Where every rank has a processor of its own, spinning is the fastest way to wait; else it only keeps the one that
  // is waited for from running.
  spins_ = ranks() <= processors() ? 2000 : 20;
}

Peers::~Peers() {
  close();
  for (size_t r = 0; r < fds_.size(); ++r) {
    munmap(base_[r], kHeapAt);
    if (char* heap = heaps_[r]) munmap(heap, heap_);
    ::close(fds_[r]);
  }
}

char* Peers::heap(int rank) {
  if (char* mapped = heaps_[rank]) return mapped;
  const std::lock_guard lock(mapping_);
  if (!heaps_[rank]) {
    char* mapped = map(fds_[rank], kHeapAt, heap_);
    madvise(mapped, heap_, MADV_HUGEPAGE);  // where the system has huge pages for shared memory
    heaps_[rank] = mapped;
  }
  return heaps_[rank];
}

int64_t Peers::heap_offset(const void* data) const {
  const char* at = static_cast<const char*>(data);
  const char* own = heaps_[rank_];
  return own && at >= own && at < own + heap_ ? at - own : -1;
}

void Peers::check_usable() const {
  if (closed_) throw std::runtime_error("deepfast: the communicator is closed");
  if (!broken_.empty()) {
    throw std::runtime_error("deepfast: the communicator is broken, make a new one (" + broken_ + ")");
  }
  if (forks != process_) throw std::runtime_error("deepfast: the communicator belongs to the parent process");
}

int Peers::begin(const Announcement& announcement) {
  check_usable();
  ++operation_;
  // Whoever still read the announcement (and the staging memory) of the operation before the last has not come to the
  // last one's first meeting, and this rank has been there.
  control(rank_).said[operation_ % 2] = announcement;
  return operation_ % 2;
}

void Peers::meet() {
  control(rank_).phase.raise(++phase_);
  for (int r = 0; r < ranks(); ++r) {
    for (int spin = 0; !control(r).phase.reached(phase_); ++spin) {
      if (spin >= spins_) return wait_slowly(phase_);
      // Now and then, the processor is offered to a rank that may have been put on the same one: ranks that often sleep
      // look idle, and the system leaves them together while something else has the other processor.
      spin % kYield == kYield - 1 ? static_cast<void>(sched_yield()) : pause();
    }
  }
}

void Peers::wait_slowly(uint32_t target) {
  const Clock::time_point start = Clock::now();
  while (true) {
    std::vector<int> late, gone;
    bool all_elsewhere = true;
    for (int r = 0; r < ranks(); ++r) {
      if (control(r).phase.reached(target)) continue;
      late.push_back(r);
      const uint32_t state = control(r).state.load();
      // Looked at again: it may have come before it went.
      if ((state != Control::kOpen || !alive(r)) && !control(r).phase.reached(target)) gone.push_back(r);
      all_elsewhere &= control(r).elsewhere.load() != 0;
    }
    if (late.empty()) return;
    if (closed_) throw std::runtime_error("deepfast: the communicator was closed while it waited");
    for (int r : gone) {
      const Control& other = control(r);
      if (other.state.load() == Control::kBroken) {
        fail("as another rank has found", {other.missing, other.missing + other.missed});
      }
    }
    if (!gone.empty()) {
      const bool closed = control(gone[0]).state.load() == Control::kClosed;
      fail(closed ? "left" : "died", named(gone));
    }
    const auto waited = Clock::now() - start;
    if (waited > timeout_.load() + (all_elsewhere ? kGrace : milliseconds(0)))
      fail("silent at the timeout", named(late));
    try {
      look_up();
    } catch (...) {
      try {
        fail("interrupted", {name(rank_)});
      } catch (const Missing&) {
      }
      throw;
    }
    control(late[0]).phase.sleep(target, kLook);
  }
}

void Peers::fail(const std::string& why, const std::vector<int>& names) {
  const std::string what = "missing rank" + std::string(names.size() > 1 ? "s " : " ") + list(names) + ": " + why;
  mark_broken(what, names);
  throw Missing("deepfast: " + what + "; the communicator is broken, make a new one", names);
}

void Peers::mark_broken(const std::string& what, const std::vector<int>& names) {
  broken_ = what;
  Control& own = control(rank_);
  own.missed = static_cast<int>(std::min<size_t>(names.size(), kMaxRanks));
  std::copy_n(names.begin(), own.missed, own.missing);
  own.state.store(Control::kBroken);
  own.phase.wake();
}

std::vector<int> Peers::gone() const {
  std::vector<int> names;
  for (int r = 0; r < ranks(); ++r) {
    const Control& other = control(r);
    const uint32_t state = other.state.load();
    if (state == Control::kBroken) return {other.missing, other.missing + other.missed};
    if (state != Control::kOpen || !alive(r)) names.push_back(names_[r]);
  }
  return names;
}

std::vector<int> Peers::named(const std::vector<int>& ranks) const {
  std::vector<int> names;
  for (int r : ranks) names.push_back(names_[r]);
  return names;
}

void Peers::close() {
  if (closed_.exchange(true) || forks != process_) return;
  Control& own = control(rank_);
  uint32_t open = Control::kOpen;
  own.state.compare_exchange_strong(open, Control::kClosed);
  own.phase.wake();
}

void Peers::check_agreement() {
  const auto text = [this](int of) {
    static const char* kinds[] = {"all-reduce", "reduce-scatter", "all-gather",
                                  "broadcast",  "sum for owners", "exchange of addresses"};
    static const char* types[] = {"float32", "float16", "bfloat16", "float64", "int32", "int64"};
    const Announcement& a = said(of);
    return "rank " + std::to_string(names_[of]) + ": " + kinds[a.kind] + " of " + std::to_string(a.numel) + " " +
           types[static_cast<int>(a.in)] + ", factor " + std::to_string(a.factor) + (a.measured ? ", measured" : "");
  };
  for (int r = 0; r < ranks(); ++r) {
    if (said(r).fits(said(rank_))) continue;
    mark_broken("the ranks do not do the same (" + text(rank_) + "; " + text(r) + ")", {});
    throw std::runtime_error("deepfast: " + broken_);
  }
}

bool Peers::all_in_heap() const {
  bool all = true;
  for (int r = 0; r < ranks(); ++r) all = all && said(r).offset >= 0;
  return all;
}

bool Peers::alive(int rank) const {
  if (rank == rank_) return true;
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_len = 1;
  return fcntl(fds_[rank], F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

}  // namespace deepfast::cpu
