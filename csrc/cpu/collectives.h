// Collectives over the ranks of one host: what each rank reads and writes, and where the ranks meet.
//
// One-shot where there is little to move: everybody shows its data and reads all; one meeting. Two-shot where there is
// much: each rank reduces its portion for all and writes the result to all. Data in the ranks' heaps is read and
// written where it lies; any other goes through staging memory, piece by piece.
#pragma once

#include "peers.h"

namespace deepfast::cpu {

constexpr int64_t kOneShot = 32 * 1024;  // bytes

struct Reduction {
  Element in, out;         // out differs only between 16- and 32-bit floats, and not in an all-reduce
  double factor;           // of the sum, before it is rounded; 1 for integers
  Statistics* statistics;  // of the result as it is stored, added in the order of squares.h; or null
};

// data[numel], contiguous, in place: the same bits on every rank.
void all_reduce(Peers& peers, void* data, int64_t numel, const Reduction& how);

// in[ranks * numel] -> out[numel]: this rank's part of the sum.
void reduce_scatter(Peers& peers, const void* in, void* out, int64_t numel, const Reduction& how);

// in[numel] -> out[ranks * numel], in rank order.
void all_gather(Peers& peers, const void* in, void* out, int64_t numel, Element in_type, Element out_type);

// data[bytes] of the rank `root` -> everybody's.
void broadcast(Peers& peers, void* data, int64_t bytes, int root);

}  // namespace deepfast::cpu
