// The step: unscale, clip, update, write the weight, reset the gradient, each value in registers once.
#pragma once

#include <utility>

#include "reduce.cuh"
#include "streams.cuh"

namespace deepfast::cuda {

// Thread blocks of a step that a multiprocessor holds at least: as many as there are registers for without spilling.
template <class Rule>
constexpr int kStepResident = Rule::kMoments > 2 ? 2 : 3;

// Sinks, as a launch takes them along.
struct Others {
  int64_t displacement[kMaxSinks];
  int count;
};

// To where each other rank has what `at` is here.
template <int kSize, class T>
__device__ void send(T* at, const Pack<T, kSize>& pack, const Others& others) {
#pragma unroll 1
  for (int k = 0; k < others.count; ++k) {
    store<kSize>(reinterpret_cast<T*>(reinterpret_cast<char*>(at) + others.displacement[k]), pack);
  }
}

// How a weight is rounded by chance, where it is.
struct Chance {
  bool asked;
  Noise noise;     // of the span's next step
  uint32_t first;  // where in the whole parameter the span's first element is
};

template <class S>
__device__ void update(const typename S::Rule& rule, const Span& span, const Chance& chance, int64_t begin, int64_t end,
                       float multiplier, float unscaling, Afterwards after, const Others& others) {
  using Rule = typename S::Rule;
  const S streams(span);
  const Weight form = streams.form();
  const DType dtype = streams.param_dtype;
  const auto body = [&](int64_t i, auto size) {
    constexpr int kSize = size.value;
    Values<kSize, S> x(Loaded<kSize, !Rule::kNeedsNorms, S>(streams, i), streams, multiplier);
    x.each([&](int, float& p, float g, auto&... moment) { p = rule.update(p, g, moment...); });
    if constexpr (!Rule::kNeedsNorms) x.store_moments(streams, i);  // else the first pass has
    if (form == Weight::kWide || form == Weight::kMaster) store<kSize>(streams.wide() + i, x.p);
    if (form == Weight::kWide) {
      send<kSize>(streams.wide() + i, x.p, others);
    } else {
      Pack<Half, kSize> half;
      if (form == Weight::kSplit) {
        Pack<Half, kSize> remainder;
        with_half(dtype, [&]<class H, class Split>() {
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            half[j] = H::from_master(x.p[j]);
            remainder[j] = Split::remainder(x.p[j], half[j]);
          }
        });
        store<kSize>(streams.remainder + i, remainder);
      } else if (form == Weight::kHalf && chance.asked) {
        with_half(dtype, [&]<class H, class>() {
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            const uint32_t element = chance.first + static_cast<uint32_t>(i + j);
            half[j] = H::stochastic(x.p[j], chance.noise.bits(element) >> 16);
          }
        });
      } else {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          half[j] = form == Weight::kHalf ? encode<false>(x.p[j], dtype) : encode<true>(x.p[j], dtype);
        }
      }
      store<kSize>(streams.half + i, half);
      send<kSize>(streams.half + i, half, others);
    }
    if (after == Afterwards::kReset) {
      streams.grad.template store<kSize>(i, {});
    } else if (after == Afterwards::kWritten) {
      auto grad = streams.grad.decode(streams.grad.template load<kSize>(i));
#pragma unroll
      for (int j = 0; j < kSize; ++j) grad[j] *= unscaling;
      streams.grad.template store<kSize>(i, streams.grad.encode(grad));
    }
  };
  if constexpr (S::kGrouped && !Rule::kNeedsNorms) {
    for_each_encoding(streams, span, begin, end, body);
  } else {
    for_each<S::kPack>(begin, end, streams.phase(), body);
  }
}

inline __device__ void reset_only(const Span& span, int64_t begin, int64_t end) {
  const auto zero = [&]<class Grad>(Grad* grad) {
    constexpr int kPack = 16 / sizeof(Grad);
    for_each<kPack>(begin, end, phase<kPack>(grad),
                    [&](int64_t i, auto size) { store<size.value>(grad + i, Pack<Grad, size.value>{}); });
  };
  span.grad_dtype == DType::kFloat32 ? zero(static_cast<float*>(span.grad)) : zero(static_cast<Half*>(span.grad));
}

// The rule of a span's next step.
template <class Rule>
__device__ Rule prepare(const Table& table, const Span& span) {
  const Hyper& row = table.hyper[span.group];
  double values[Rule::kHyper];
#pragma unroll
  for (int k = 0; k < Rule::kHyper; ++k) values[k] = row.values[1 + k];
  if (row.lr) values[0] = row.lr_is_fp64 ? *static_cast<const double*>(row.lr) : *static_cast<const float*>(row.lr);
  return Rule::prepare(values, Rule::kCountsSteps ? static_cast<int64_t>(*span.step + 1.0f) : 0);
}

inline __device__ Chance chance_of(const Span& span) {
  return {span.rounding == Rounding::kStochastic, Noise::of(span.seed, next_step(span)),
          static_cast<uint32_t>(span.first)};
}

inline __device__ float multiplier_of(const StepRecord& record, const Table& table, const Span& span) {
  return record.multiplier * static_cast<float>(table.hyper[span.group].values[0]);
}

// Moves all step counts on, by one thread block: many loads at once, for nothing else is under way any more.
inline __device__ void count_steps(const Table& table) {
  constexpr int kEach = 8;
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < table.count; first += kEach * kThreads) {
    float* at[kEach];
    float count[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t span = first + k * kThreads;
      at[k] = span < table.count ? table.spans[span].step : nullptr;
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) count[k] = at[k] ? *at[k] : 0.0f;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (at[k]) *at[k] = count[k] + 1.0f;
    }
  }
}

// One thread finds the rule out for all: its fp64 arithmetic is slow on most GPUs. The step counts are moved on by the
// last thread block to finish, when nobody will read them any more.
template <class Rule, bool kAny>
__global__ void __launch_bounds__(kThreads, kStepResident<Rule>)
    step_kernel(const __grid_constant__ Packed packed, const StepRecord* record_at, const Norms* norms,
                Afterwards after, const __grid_constant__ Others others, uint32_t* counter) {
  const Table table(packed);
  const StepRecord record = *record_at;
  if (record.skipped()) {
    if (after != Afterwards::kReset) return;
    for (Share share(table); share.more(); share.next()) {
      const Span& span = table.spans[share.span];
      reset_only(span, share.first() * kStepBlock, min(share.last() * kStepBlock, span.numel));
    }
    return;
  }
  __shared__ Rule shared;
  __shared__ Chance drawn;
  const Chance none = {};
  for (Share share(table); share.more(); share.next()) {
    const Span& span = table.spans[share.span];
    __syncthreads();  // all have read the last span's rule
    if (threadIdx.x == 0) {
      shared = prepare<Rule>(table, span);
      if constexpr (Rule::kNeedsNorms) shared.adapt(norms[share.span]);
      if constexpr (kAny) drawn = chance_of(span);
      if constexpr (kAny && Rule::kMoments > 0 && !Rule::kNeedsNorms) waiting<Rule::kMoments>().draw(span);
    }
    __syncthreads();
    const Rule rule = shared;
    const Chance& chance = kAny ? drawn : none;  // there it takes no registers
    const int64_t begin = share.first() * kStepBlock, end = min(share.last() * kStepBlock, span.numel);
    with_streams<Rule, kAny>(span, [&]<class S>() {
      update<S>(rule, span, chance, begin, end, multiplier_of(record, table, span), record.multiplier, after, others);
    });
  }
  if constexpr (Rule::kCountsSteps || kAny) {
    if (last_to_arrive(counter, gridDim.x)) count_steps(table);
  }
}

template <class Rule, bool kAny>
void launch_step(const Packed& packed, const Workspace& workspace, const StepRecord* record, const Norms* norms,
                 Afterwards after, const Others& others, Stream stream) {
  launch(step_kernel<Rule, kAny>, elementwise_grid(packed.blocks), kThreads, stream, packed, record, norms, after,
         others, workspace.counters);
}

}  // namespace deepfast::cuda
