// One read of the gradients: the sum of their squares, whether all are finite, and what follows for the step.
#include "reduce.cuh"

namespace deepfast::cuda {
namespace {

__device__ void decide_into(StepRecord* record, const Statistics& statistics, const Question& question) {
  *record = deepfast::decide(statistics, question.grad_scale ? *question.grad_scale : 1.0f,
                             question.found_inf ? *question.found_inf : 0.0f, question.max_norm, question.check);
}

// The sums of the blocks [first, last) of a span.
template <class Grad>
__device__ void sum_blocks(const Span& span, int64_t first, int64_t last, double* partial) {
  constexpr int kSize = 16 / sizeof(Grad);
  const Group<kSize> group;
  const DType dtype = span.grad_dtype;
  const Grad* grad = static_cast<const Grad*>(span.grad);
  for (int64_t block = first + group.index; block < last; block += group.kGroups) {
    const int64_t begin = block * kReadBlock, n = min(span.numel - begin, static_cast<int64_t>(kReadBlock));
    const auto for_each = [&](auto rows, const auto& body) {
      group.template for_each<rows.value>(
          begin, n, phase<kSize>(grad), [&](int64_t i, auto size) { return load<size.value>(grad + i); },
          [&](const auto& g, int64_t, int j, auto size) {
#pragma unroll
            for (int k = 0; k < size.value; ++k) body(j + k, decode(g[k], dtype));
          });
    };
    Lane lanes[kSize] = {};
    for_each(std::integral_constant<int, 8>(), [&](int j, float g) { lanes[j].add(g); });
    const double sum = group.total(lanes, [&](double (&sums)[kSize]) {
      for_each(std::integral_constant<int, 1>(), [&](int j, float g) { sums[j] += static_cast<double>(g) * g; });
    });
    if (group.member == 0) partial[block] = sum;
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    statistics_kernel(const __grid_constant__ Packed packed, double* partial, uint32_t* counters, Statistics* out,
                      StepRecord* record, Question question) {
  const Table table(packed);
  Share share(table);
  const int64_t begin = share.block;
  for (; share.more(); share.next()) {
    const Span& span = table.spans[share.span];
    double* sums = partial + table.first[share.span];
    if (span.grad_dtype == DType::kFloat32) {
      sum_blocks<float>(span, share.first(), share.last(), sums);
    } else {
      sum_blocks<Half>(span, share.first(), share.last(), sums);
    }
  }
  const Fold<Statistics, double> all = {partial, table.blocks, reinterpret_cast<Statistics*>(partial + table.blocks),
                                        counters};
  Statistics total = {};
  const auto sharers = [&](int64_t first, int64_t last) { return share.sharers(first, last); };
  if (all.arrive(begin, share.end, sharers, total) && threadIdx.x == 0) {
    if (out) *out = total;
    if (record) decide_into(record, total, question);
  }
}

__global__ void decide_kernel(StepRecord* record, const Statistics* statistics, Question question) {
  decide_into(record, statistics ? *statistics : Statistics(), question);
}

}  // namespace

Needs statistics_needs(const Job& job) {
  const int64_t blocks = blocks_of(job, kReadBlock), slots = fold_slot(blocks, 1);
  return {static_cast<int64_t>(blocks * sizeof(double) + slots * sizeof(Statistics)), slots, table_bytes(job)};
}

void statistics(const Job& job, const Workspace& workspace, Statistics* out, StepRecord* record,
                const Question& question, Stream stream) {
  Packed packed;
  pack(packed, job, kReadBlock, workspace, stream);
  launch(statistics_kernel, persistent_grid(statistics_kernel, packed.blocks), kThreads, stream, packed,
         static_cast<double*>(workspace.partial), workspace.counters, out, record, question);
}

void decide(StepRecord* record, const Statistics* statistics, const Question& question, Stream stream) {
  launch(decide_kernel, 1, 1, stream, record, statistics, question);
}

}  // namespace deepfast::cuda
