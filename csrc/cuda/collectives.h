// Collectives over the ranks of one host, each with a GPU whose memory the others see: torch-free, like kernels.h.
//
// One kernel an operation and a rank. Its thread blocks meet their namesakes of the other ranks: when one has arrived,
// its rank's kernel has begun, so that rank's data is there. Little data is copied to where all can read it, and summed
// by every rank (one-shot). Much data must lie in peer memory: each rank sums its portion for all, and writes the
// result to all (two-shot); the ranks meet once more before the kernels end. Nothing waits on the host.
#pragma once

#include "../math/collective.h"
#include "kernels.h"

namespace deepfast::cuda {

constexpr int kMaxPeers = 8;                 // GPUs of one host
constexpr int kMeetings = 64;                // thread blocks at most: a GPU must hold them all at once
constexpr int kProcessors = kMeetings / 2;   // that they fill
constexpr int64_t kOneShot = 256 * 1024;     // bytes
constexpr int64_t kSums = int64_t{1} << 19;  // blocks of statistics, of one operation

// What a rank is about to do. All must say the same.
struct Announcement {
  int32_t kind;
  Element in, out;
  int64_t numel, place;
  double factor;
  bool measured;  // whether statistics or found_inf are asked for

  DF_INLINE bool operator==(const Announcement& other) const {
    return kind == other.kind && in == other.in && out == other.out && numel == other.numel && place == other.place &&
           factor == other.factor && measured == other.measured;
  }
};

// What a thread block and its namesakes tell each other.
struct Meeting {
  uint32_t arrived[kMaxPeers];  // how often rank r's has come to a meeting here
  uint32_t count;               // how often this one has: its own affair
  Announcement said[2];         // in even and odd operations
};

// The beginning of a rank's peer memory. Zero at first.
struct Shared {
  uint32_t operations;  // that have ended
  uint32_t ended;       // thread blocks of this one
  uint32_t broken;      // one has failed: those that were launched after it must not go on
  alignas(16) Meeting meeting[kMeetings];
};
constexpr int64_t kStageAt = (sizeof(Shared) + 4095) / 4096 * 4096;  // bytes; [2][kOneShot], by even and odd operations
constexpr int64_t kSumsAt = kStageAt + 2 * kOneShot;                 // double [kSums]: of the blocks of the result
constexpr int64_t kPeerBytes = kSumsAt + kSums * sizeof(double);

// In pinned host memory: what host and device tell each other without a wait. Zero at first.
struct Status {
  uint32_t give_up;             // by the host: nobody waits any longer
  uint32_t begun, ended;        // by the device: operations
  uint32_t disagree;            // by the device: the ranks do not do the same
  uint32_t kind;                // by the device: of the operation begun
  uint32_t missing[kMaxPeers];  // by the device, once it has given up: who had not come
};

struct Call {
  enum Kind : int32_t { kAllReduce, kReduceScatter, kAllGather };
  Kind kind;
  Element in, out;  // out differs only between floats of 16 and 32 bits, and not in an all-reduce
  int rank, ranks;
  const void* input;        // this rank's; [numel], of a reduce-scatter [ranks][numel]
  char* output;             // this rank's; [numel], of an all-gather [ranks][numel]; of an all-reduce the input
  int64_t numel;            // of the smaller of the two
  double factor;            // of the sum, before it is rounded; 1 for integers
  int64_t place;            // of the input in peer memory, the same number on all ranks; < 0: it lies elsewhere
  char* shared[kMaxPeers];  // each rank's Shared, as this one sees it
  char* data[kMaxPeers];    // each rank's input, where place >= 0
  Statistics* statistics;   // [1] of the output, or null
  float* found_inf;         // [1], set to 1 where the output is not finite; or null
  Status* status;

  DF_INLINE bool measured() const { return statistics || found_inf; }
};

constexpr int kMostTogether = 8;

// Launches calls[0]. count > 1, for tests: that many ranks of one device, in one cooperative launch; `meetings` (at
// most kMeetings) thread blocks each.
void collective(const Call* calls, int count, int meetings, Stream stream);

}  // namespace deepfast::cuda
