// Gradients of several ranks, summed by the ranks that own them.
//
// A bucket is cut into as many chunks as there are ranks, and rank r keeps the fp32 sum of chunk r: of one micro-batch
// after the other, and of each micro-batch the ranks' gradients in rank order. That is the order in which one process
// adds up the same micro-batches, dealt out in turn: any number of ranks gets the same bits.
#pragma once

#include <vector>

#include "../span.h"
#include "peers.h"

namespace deepfast::cpu {

// A gradient's place in its bucket. What no gradient covers is zero.
struct Segment {
  int64_t begin, end;  // elements of the bucket
  const void* data;
  DType dtype;
};

struct OwnedSum {
  Element in;              // the gradients' type, if they have one in common; else fp32
  int64_t numel;           // of the bucket
  int64_t chunk;           // elements that each rank owns, whole blocks of the statistics; the last ranks may own less
  float weight;            // of this rank's gradients
  bool overwrite;          // the first of a step
  bool everywhere;         // the sum goes to all ranks, of whose heaps it is a part, beginning with the bucket
  Statistics* statistics;  // of the whole bucket's sum, in the order of squares.h; or null
};

// segments: in order. sum: the owned chunk's first element.
void add_to_owners(Peers& peers, const std::vector<Segment>& segments, float* sum, const OwnedSum& how);

}  // namespace deepfast::cpu
