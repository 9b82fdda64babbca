// The threads of a block as fibers; the ranks of a cooperative launch as threads.
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_host {
namespace {

constexpr int kMostThreads = 1024, kLanes = 32;
constexpr size_t kStack = 512 << 10;

enum class State { kReady, kAtBlockBarrier, kAtExchange, kDone };

// Where a fiber goes on: its stack, with the registers that a call preserves on top. (ucontext would do, but under the
// address sanitizer each of its switches clears the shadow of a whole stack.)
using Context = void*;
extern "C" void switch_context(Context* from, Context to);
#if defined(__x86_64__)
asm(R"(
switch_context:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
constexpr int kReturn = 6;  // where the address lies that it returns to
#elif defined(__aarch64__)
asm(R"(
switch_context:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp d8, d9, [sp, #80]
  stp d10, d11, [sp, #96]
  stp d12, d13, [sp, #112]
  stp d14, d15, [sp, #128]
  stp x29, x30, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x29, x30, [sp, #144]
  ldp d14, d15, [sp, #128]
  ldp d12, d13, [sp, #112]
  ldp d10, d11, [sp, #96]
  ldp d8, d9, [sp, #80]
  ldp x27, x28, [sp, #64]
  ldp x25, x26, [sp, #48]
  ldp x23, x24, [sp, #32]
  ldp x21, x22, [sp, #16]
  ldp x19, x20, [sp], #160
  ret
)");
constexpr int kReturn = 19;
#endif

// A stack on which `main` begins when it is switched to.
Context fresh_context(char* stack, size_t size, void (*main)()) {
  void** registers = reinterpret_cast<void**>(stack + size) - 32;  // on a boundary of 16 bytes
  std::fill(registers, registers + 32, nullptr);
  registers[kReturn] = reinterpret_cast<void*>(main);
  return registers;
}

struct Fiber {
  Context context;
  State state;
  uint32_t mask;  // of the exchange it waits for
  int apart;      // how far away the lane is that it asks
  alignas(16) char mine[16], theirs[16];
};

struct Stacks {
  static constexpr size_t kSize = kMostThreads * kStack;
  char* const at = static_cast<char*>(
      mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  ~Stacks() { munmap(at, kSize); }
};

thread_local std::vector<Fiber> fibers(kMostThreads);
thread_local Stacks stacks;
thread_local Context scheduler;
thread_local const std::function<void()>* running = nullptr;
thread_local int current = 0;
thread_local bool any = false;
thread_local std::mt19937 random_order(0);
// Thread blocks that wait for their namesakes in other processes must run in the same order there: the grid decides it.
const bool fixed_blocks = std::getenv("CUDA_ON_HOST_FIXED_BLOCKS") != nullptr;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s (thread %d of block %u)\n", what, current, blockIdx.x);
  std::abort();
}

void wait(State state) {
  fibers[current].state = state;
  const int self = current;
  switch_context(&fibers[self].context, scheduler);
}

void main_of_fiber() {
  (*running)();
  fibers[current].state = State::kDone;
  switch_context(&fibers[current].context, scheduler);
}

// Lets go who has waited long enough. Whether somebody can run.
bool release(int threads) {
  bool all_there = true, somebody_done = false, somebody_waits = false, ready = false;
  for (int t = 0; t < threads; ++t) {
    all_there &= fibers[t].state == State::kAtBlockBarrier;
    somebody_done |= fibers[t].state == State::kDone;
    somebody_waits |= fibers[t].state == State::kAtBlockBarrier;
  }
  if (somebody_done && somebody_waits) fail("a thread has ended, others wait for it at a barrier");
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    if (fiber.state == State::kAtBlockBarrier && all_there) fiber.state = State::kReady;
    if (fiber.state == State::kAtExchange) {
      const int warp = t / kLanes * kLanes;
      bool together = true;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (!(fiber.mask >> lane & 1)) continue;
        const Fiber& other = fibers[warp + lane];
        together &= other.state == State::kAtExchange && other.mask == fiber.mask;
      }
      if (together) {
        const uint32_t mask = fiber.mask;
        for (int lane = 0; lane < kLanes; ++lane) {
          if (!(mask >> lane & 1)) continue;
          Fiber& self = fibers[warp + lane];
          std::memcpy(self.theirs, fibers[warp + (lane ^ self.apart)].mine, sizeof self.theirs);
          self.state = State::kReady;
        }
      }
    }
    ready |= fiber.state == State::kReady;
  }
  return ready;
}

void run_block(int threads) {
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.state = State::kReady;
    fiber.context = fresh_context(stacks.at + t * kStack, kStack, main_of_fiber);
  }
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  do {
    std::shuffle(order.begin(), order.end(), random_order);
    const uint32_t slow = random_order();  // warps: these stay behind this turn
    for (int t : order) {
      if (fibers[t].state != State::kReady || (slow >> t / kLanes & 1)) continue;
      current = t;
      threadIdx = dim3(t);
      switch_context(&scheduler, fibers[t].context);
    }
  } while (release(threads));
  for (int t = 0; t < threads; ++t) {
    if (fibers[t].state != State::kDone) fail("threads wait for each other");
  }
}

}  // namespace

void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  if (block.x > kMostThreads || grid.x == 0 || grid.y == 0) fail("no such launch");
  std::vector<unsigned> order(grid.x);
  std::iota(order.begin(), order.end(), 0u);
  std::mt19937 by_grid(grid.x);
  std::shuffle(order.begin(), order.end(), fixed_blocks ? by_grid : random_order);
  const auto rank = [&](unsigned y) {
    running = &kernel;
    gridDim = grid;
    blockDim = block;
    for (unsigned b : order) {
      blockIdx = dim3(b, y);
      run_block(static_cast<int>(block.x));
    }
  };
  if (grid.y == 1) return rank(0);
  std::vector<std::thread> ranks;
  for (unsigned y = 0; y < grid.y; ++y) {
    ranks.emplace_back([&, y, seed = random_order()] {
      random_order.seed(seed);
      rank(y);
    });
  }
  for (std::thread& each : ranks) each.join();
}

void let_others_run() {
  sched_yield();
  wait(State::kReady);
}

void wait_for_block() { wait(State::kAtBlockBarrier); }

void exchange(uint32_t mask, const void* mine, void* theirs, size_t size, int apart) {
  Fiber& self = fibers[current];
  const int lane = current % kLanes;
  if (!(mask >> lane & 1) || !(mask >> (lane ^ apart) & 1)) fail("a lane exchanges what its mask leaves out");
  std::memcpy(self.mine, mine, size);
  self.mask = mask;
  self.apart = apart;
  wait(State::kAtExchange);
  std::memcpy(theirs, self.theirs, size);
}

bool any_of_block(bool mine) {
  any |= mine;
  wait_for_block();
  const bool result = any;
  wait_for_block();  // all have seen it
  any = false;
  wait_for_block();
  return result;
}

}  // namespace cuda_on_host
