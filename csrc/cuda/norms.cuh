// The first pass of a rule that needs norms: moves the moments on, and measures.
#pragma once

#include "step.cuh"

namespace deepfast::cuda {

// Neighbouring threads read 256 bytes of a row, and others the rows of another block, 4 KiB away: several rows at once
// make longer pieces of it. (There are registers for one where types are looked at, or where a split
// master lies beside an fp32 gradient.)
template <class S>
constexpr int kRowsAtOnce = S::kAny || (S::kSplit && !std::is_same_v<typename S::Grad, Half>) ? 1 : 2;

// Moves the moments on, where those of a whole group have to be known before one of them can be stored.
template <class S>
__device__ void move(const typename S::Rule& rule, const Span& span, int64_t begin, int64_t end, float multiplier) {
  const S streams(span);
  for_each_encoding(streams, span, begin, end, [&](int64_t i, auto size) {
    Values<size.value, S> x(Loaded<size.value, true, S>(streams, i), streams, multiplier);
    x.each([&](int, float p, float g, auto&... moment) { rule.direct(p, g, moment...); });
    x.store_moments(streams, i);
  });
}

// The sums over the blocks [first, last) of a span. A block's sums are taken while its elements are in registers.
// Moments in groups have been moved on before.
template <class S>
__device__ void measure(const typename S::Rule& rule, const Span& span, int64_t first, int64_t last, float multiplier,
                        Norms* partial) {
  constexpr int kSize = S::kPack;
  using Count = std::conditional_t<S::kAny, int, int64_t>;
  const S streams(span);
  const int phase = streams.phase();
  const Group<kSize> group;
  for (int64_t block = first + group.index; block < last; block += group.kGroups) {
    const int64_t begin = block * kStepBlock;
    const auto n = static_cast<Count>(min(span.numel - begin, static_cast<int64_t>(kStepBlock)));
    Lane params[kSize] = {}, directions[kSize] = {};
    group.template for_each<kRowsAtOnce<S>>(
        begin, n, phase, [&](int64_t i, auto size) { return Loaded<size.value, !S::kGrouped, S>(streams, i); },
        [&](const auto& loaded, int64_t i, int at, auto size) {
          Values<size.value, S> x(loaded, streams, multiplier);
          float direction[size.value];
          if constexpr (!S::kGrouped) {
            x.each([&](int j, float p, float g, auto&... moment) { direction[j] = rule.direct(p, g, moment...); });
            x.store_moments(streams, i);
          }
          if constexpr (S::kAny) {  // what is measured is what the second pass will take
            x.each([&](int j, float p, float, auto&... moment) { direction[j] = rule.direction(p, moment...); });
          }
#pragma unroll
          for (int j = 0; j < size.value; ++j) {
            params[at + j].add(x.p[j]);
            directions[at + j].add(direction[j]);
          }
        });
    // In fp64, the direction is found again from the moments, as in the second pass.
    const auto again = [&](const auto& value) {
      return [&](double (&sums)[kSize]) {
        group.template for_each<1>(begin, n, phase, [&](int64_t i, int at, auto size) {
          Values<size.value, S> x(Loaded<size.value, false, S>(streams, i), streams, multiplier);
          x.each([&](int j, float p, float, auto&... moment) {
            const double v = value(p, moment...);
            sums[at + j] += v * v;
          });
        });
      };
    };
    const double param = group.total(params, again([](float p, auto&...) { return p; }));
    const double direction =
        group.total(directions, again([&](float p, auto&... moment) { return rule.direction(p, moment...); }));
    if (group.member == 0) partial[block] = {param, direction};
  }
}

template <class Rule, bool kAny>
__global__ void __launch_bounds__(kThreads, kResident)
    norms_kernel(const __grid_constant__ Packed packed, const StepRecord* record_at, Norms* partial, uint32_t* counters,
                 Norms* out) {
  const Table table(packed);
  const StepRecord record = *record_at;
  if (record.skipped()) {
    for (Share share(table); share.more(); share.next()) {
      if (threadIdx.x == 0) out[share.span] = Norms();
    }
    return;
  }
  __shared__ Rule shared;
  for (Share share(table); share.more(); share.next()) {
    const Span& span = table.spans[share.span];
    __syncthreads();
    if (threadIdx.x == 0) {
      shared = prepare<Rule>(table, span);
      if constexpr (kAny) waiting<Rule::kMoments>().draw(span);
    }
    __syncthreads();
    const Rule& rule = shared;  // there it takes no registers
    Norms* sums = partial + table.first[share.span];
    with_streams<Rule, kAny>(span, [&]<class S>() {
      if constexpr (S::kGrouped) {
        const int64_t begin = share.first() * kStepBlock, end = min(share.last() * kStepBlock, span.numel);
        move<S>(rule, span, begin, end, multiplier_of(record, table, span));
        __syncthreads();  // what is measured has been encoded by other threads
      }
      measure<S>(rule, span, share.first(), share.last(), multiplier_of(record, table, span), sums);
    });
    const int64_t base = table.first[share.span], slot = fold_slot(base, share.span);
    const Fold<Norms, Norms> all = {sums, table.first[share.span + 1] - base, partial + table.blocks + slot,
                                    counters + slot};
    const auto sharers = [&](int64_t first, int64_t last) { return share.sharers(base + first, base + last); };
    Norms total = {};
    if (all.arrive(share.first(), share.last(), sharers, total) && threadIdx.x == 0) out[share.span] = total;
  }
}

template <class Rule, bool kAny>
void launch_norms(const Packed& packed, const Workspace& workspace, const StepRecord* record, Norms* out,
                  Stream stream) {
  const auto kernel = norms_kernel<Rule, kAny>;
  launch(kernel, persistent_grid(kernel, packed.blocks), kThreads, stream, packed, record,
         static_cast<Norms*>(workspace.partial), workspace.counters, out);
}

}  // namespace deepfast::cuda
