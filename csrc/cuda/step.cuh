// The step: unscale, clip, update, write the weight, reset the gradient, each value in registers once.
#pragma once

#include <utility>

#include "pack.cuh"
#include "reduce.cuh"

namespace deepfast::cuda {

// Thread blocks of a step that a multiprocessor holds at least: as many as there are registers for without spilling.
template <class Rule>
constexpr int kStepResident = Rule::kMoments > 2 ? 2 : 3;

// Sinks, as a launch takes them along.
struct Others {
  int64_t displacement[kMaxSinks];
  int count;
};

enum class Weight { kWide, kMaster, kHalf };  // fp32; 16 bits and an fp32 master; 16 bits alone

// A span's streams, with their types: what is read before an update, and written after it.
template <class Rule, Weight kWeight, class Grad>
struct Streams {
  static constexpr bool kHalfOnly = kWeight == Weight::kHalf && Rule::kMoments == 0 && sizeof(Grad) == 2;
  static constexpr int kPack = kHalfOnly ? 8 : 4;  // 16 bytes of the widest stream
  static constexpr int kSlots = Rule::kMoments > 0 ? Rule::kMoments : 1;
  using Value = std::conditional_t<kWeight == Weight::kHalf, Half, float>;

  Value* weight;  // the value that is updated
  Half* half;     // what a master is rounded to
  Grad* grad;
  float* moment[kSlots];
  DType param_dtype, grad_dtype;

  __device__ explicit Streams(const Span& span)
      : weight(static_cast<Value*>(kWeight == Weight::kMaster ? span.master : span.param)),
        half(static_cast<Half*>(span.param)),
        grad(static_cast<Grad*>(span.grad)),
        param_dtype(span.param_dtype),
        grad_dtype(span.grad_dtype) {
    for (int k = 0; k < Rule::kMoments; ++k) moment[k] = span.moment[k];
  }

  // As in for_each; -1 where the streams are never aligned together.
  __device__ int phase() const {
    const int common = cuda::phase<kPack>(weight);
    bool same = cuda::phase<kPack>(grad) == common;
    if constexpr (kWeight == Weight::kMaster) same &= cuda::phase<kPack>(half) == common;
    for (int k = 0; k < Rule::kMoments; ++k) same &= cuda::phase<kPack>(moment[k]) == common;
    return same ? common : -1;
  }
};

// Calls formula(p, g, moment...) on each of kSize elements in registers.
template <class Rule, int kSize, class Moments, class Formula>
__device__ void in_registers(float (&p)[kSize], const float (&g)[kSize], Moments& moments, const Formula& formula) {
  [&]<size_t... K>(std::index_sequence<K...>) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) formula(p[j], g[j], moments[K].value[j]...);
  }(std::make_index_sequence<Rule::kMoments>());
}

// What is loaded of kSize elements: all loads are under way before the first value is needed.
template <int kSize, bool kReadsGrad, class Rule, Weight kWeight, class Grad>
struct Loaded {
  using S = Streams<Rule, kWeight, Grad>;
  float p[kSize], g[kSize];
  Pack<float, kSize> moment[S::kSlots];

  __device__ Loaded(const S& streams, int64_t i, float multiplier) {
    const auto weight = load<kSize>(streams.weight + i);
    Pack<Grad, kSize> grad = {};
    if constexpr (kReadsGrad) grad = load<kSize>(streams.grad + i);
    if constexpr (Rule::kMoments > 0) {
#pragma unroll
      for (int k = 0; k < Rule::kMoments; ++k) moment[k] = load<kSize>(streams.moment[k] + i);
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      p[j] = decode(weight[j], streams.param_dtype);
      g[j] = decode(grad[j], streams.grad_dtype) * multiplier;
    }
  }

  __device__ void store_moments(const S& streams, int64_t i) const {
    if constexpr (Rule::kMoments > 0) {
#pragma unroll
      for (int k = 0; k < Rule::kMoments; ++k) store<kSize>(streams.moment[k] + i, moment[k]);
    }
  }
};

// To where each other rank has what `at` is here.
template <int kSize, class T>
__device__ void send(T* at, const Pack<T, kSize>& pack, const Others& others) {
#pragma unroll 1
  for (int k = 0; k < others.count; ++k) {
    store<kSize>(reinterpret_cast<T*>(reinterpret_cast<char*>(at) + others.displacement[k]), pack);
  }
}

template <class Rule, Weight kWeight, class Grad>
__device__ void update(const Rule& rule, const Span& span, int64_t begin, int64_t end, float multiplier,
                       float unscaling, Afterwards after, const Others& others) {
  using S = Streams<Rule, kWeight, Grad>;
  const S streams(span);
  for_each<S::kPack>(begin, end, streams.phase(), [&](int64_t i, auto size) {
    constexpr int kSize = size.value;
    Loaded<kSize, !Rule::kNeedsNorms, Rule, kWeight, Grad> x(streams, i, multiplier);
    in_registers<Rule>(x.p, x.g, x.moment,
                       [&](float& p, float g, auto&... moment) { p = rule.update(p, g, moment...); });
    if constexpr (!Rule::kNeedsNorms) x.store_moments(streams, i);  // else the first pass has
    Pack<typename S::Value, kSize> weight;
    Pack<Half, kSize> half;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if constexpr (kWeight == Weight::kHalf) {
        weight[j] = encode<false>(x.p[j], streams.param_dtype);
      } else {
        weight[j] = x.p[j];
        if constexpr (kWeight == Weight::kMaster) half[j] = encode<true>(x.p[j], streams.param_dtype);
      }
    }
    store<kSize>(streams.weight + i, weight);
    if constexpr (kWeight == Weight::kMaster) {
      store<kSize>(streams.half + i, half);
      send<kSize>(streams.half + i, half, others);
    } else {
      send<kSize>(streams.weight + i, weight, others);
    }
    if (after == Afterwards::kReset) {
      store<kSize>(streams.grad + i, Pack<Grad, kSize>{});
    } else if (after == Afterwards::kWritten) {
      auto grad = load<kSize>(streams.grad + i);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        grad[j] = stored<Grad>(decode(grad[j], streams.grad_dtype) * unscaling, streams.grad_dtype);
      }
      store<kSize>(streams.grad + i, grad);
    }
  });
}

// call.template operator()<kWeight, Grad>() with the types of the span.
template <class Call>
__device__ void with_types(const Span& span, const Call& call) {
  const bool half_grad = span.grad_dtype != DType::kFloat32;
  if (span.param_dtype == DType::kFloat32) {
    half_grad ? call.template operator()<Weight::kWide, Half>() : call.template operator()<Weight::kWide, float>();
  } else if (span.master) {
    half_grad ? call.template operator()<Weight::kMaster, Half>() : call.template operator()<Weight::kMaster, float>();
  } else {
    half_grad ? call.template operator()<Weight::kHalf, Half>() : call.template operator()<Weight::kHalf, float>();
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
template <class Rule>
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
  for (Share share(table); share.more(); share.next()) {
    const Span& span = table.spans[share.span];
    __syncthreads();  // all have read the last span's rule
    if (threadIdx.x == 0) {
      shared = prepare<Rule>(table, span);
      if constexpr (Rule::kNeedsNorms) shared.adapt(norms[share.span]);
    }
    __syncthreads();
    const Rule rule = shared;
    const int64_t begin = share.first() * kStepBlock, end = min(share.last() * kStepBlock, span.numel);
    with_types(span, [&]<Weight kWeight, class Grad>() {
      update<Rule, kWeight, Grad>(rule, span, begin, end, multiplier_of(record, table, span), record.multiplier, after,
                                  others);
    });
  }
  if constexpr (Rule::kCountsSteps) {
    if (last_to_arrive(counter, gridDim.x)) count_steps(table);
  }
}

template <class Rule>
void launch_step(const Packed& packed, const Workspace& workspace, const StepRecord* record, const Norms* norms,
                 Afterwards after, const Others& others, Stream stream) {
  launch(step_kernel<Rule>, elementwise_grid(packed.blocks), kThreads, stream, packed, record, norms, after, others,
         workspace.counters);
}

}  // namespace deepfast::cuda
