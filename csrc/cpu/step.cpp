// The step: unscale, clip, update, write the weight, reset the gradient, each value in registers once.
#include <cstring>

#include "../math/rules.h"
#include "blocks.h"
#include "int8.h"
#include "kernels.h"
#include "reduce.h"
#include "streams.h"

namespace deepfast::cpu {
namespace {

// Elements from which 16-bit weights are written past the caches: below, the next forward pass finds them there. A
// plain store would read the line first, and evict what the step still needs.
constexpr int64_t kStreamFrom = 4 << 20;

// Elements [begin, begin + n): a formula that knows nothing of loops, in a loop that knows nothing of formulas.
template <class Rule, class Streams>
void update(const Rule rule, const Streams s, float multiplier, int64_t begin, int64_t n, bool past) {
  constexpr bool kGrad = !Rule::kNeedsNorms;
  for_each(
      n, [&](int64_t k) { s.template ask_ahead<kGrad>(begin + k); },
      [&](int64_t k, auto v) {
        const int64_t i = begin + k;
        auto x = s.template load<kGrad>(i, v);
        x.p = with_moments(x, [&](auto&... moment) { return rule.update(x.p, x.g * multiplier, moment...); });
        if constexpr (kGrad) s.store_moments(x, i);  // else the first pass has
        s.store_weight(x.p, i, past);
      });
}

// A block of new weights, and those who get it.
class Outgoing {
 public:
  // The weights come from where they are stored, or, if that is only written and not read, from a place in the cache.
  Outgoing(const Span& span, int64_t offset, const Sinks& sinks)
      : span_(span), offset_(offset), sinks_(sinks), size_(size_of(span.param_dtype)) {
    staged_ = sinks.count > 0 && span.master && !span.has_split() && span.param_dtype != DType::kFloat32;
  }

  Span written() {
    Span span = span_;
    if (staged_) span.param = place_ - offset_;
    return span;
  }

  void send(int64_t n, bool past) const {
    char* own = static_cast<char*>(span_.param) + offset_ * size_;
    const char* from = staged_ ? reinterpret_cast<const char*>(place_) : own;
    if (staged_) copy(from, own, n * size_, past);
    for (int64_t k = 0; k < sinks_.count; ++k) copy(from, own + sinks_.displacement[k], n * size_, past);
  }

 private:
  static void copy(const char* from, char* to, int64_t bytes, bool past) {
    constexpr int64_t kWide = 2 * kWidth<Pack>;  // bytes of a register's halves
    int64_t done = 0;
    if (past && reinterpret_cast<uintptr_t>(to) % kWide == 0) {
      for (; done + kWide <= bytes; done += kWide) {
        store_past_caches(load(reinterpret_cast<const uint16_t*>(from + done), Pack()),
                          reinterpret_cast<uint16_t*>(to + done));
      }
    }
    std::memcpy(to + done, from + done, bytes - done);
  }

  const Span& span_;
  const int64_t offset_;
  const Sinks& sinks_;
  const int64_t size_;
  bool staged_;
  alignas(64) uint16_t place_[kReadBlock];
};

void reset(const Span& span, int64_t offset, int64_t n) {
  const int64_t size = size_of(span.grad_dtype);
  std::memset(static_cast<char*>(span.grad) + offset * size, 0, n * size);
}

// The gradient as the step takes it. The sign of a step that ascends is not the gradient's.
void write_unscaled(const Span& span, int64_t offset, int64_t n, float multiplier) {
  for_each(
      n, [](int64_t) {},
      [&](int64_t k, auto v) {
        const int64_t i = offset + k;
        store(load<decltype(v)>(span.grad, span.grad_dtype, i) * multiplier, span.grad, span.grad_dtype, i);
      });
}

struct Table {
  const Span* spans;
  int64_t count;
  const double* hyper;  // [groups, stride], a row being the gradient's sign and what the rule's prepare() takes
  int64_t stride;

  const double* row(int64_t s) const { return hyper + spans[s].group * stride; }

  // Whether span s takes what its predecessor was prepared with.
  bool same(int64_t s) const {
    if (s == 0 || spans[s].group != spans[s - 1].group) return false;
    if (!spans[s].step || !spans[s - 1].step) return true;  // the rule does not count
    return *spans[s].step == *spans[s - 1].step;
  }

  template <class Rule>
  Rule prepare(int64_t s, float ahead) const {
    const int64_t t = Rule::kCountsSteps ? static_cast<int64_t>(*spans[s].step + ahead) : 0;
    return Rule::prepare(row(s) + 1, t);
  }
};

template <class Rule>
void step_with(const Table& table, const StepRecord& record, const Norms* norms, Afterwards after, const Sinks& sinks) {
  const Span* spans = table.spans;
  const Blocks blocks(spans, table.count, kReadBlock);  // nothing is added up here: what is large is walked in one go
  if (record.skipped()) {
    if (after == Afterwards::kReset) {
      blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t) { reset(spans[s], offset, n); });
    }
    return;
  }
  std::vector<Rule> rules(table.count);
  for (int64_t s = 0; s < table.count; ++s) {
    if (spans[s].step) *spans[s].step += 1.0f;
    rules[s] = table.same(s) ? rules[s - 1] : table.prepare<Rule>(s, 0.0f);
    if constexpr (Rule::kNeedsNorms) rules[s].adapt(norms[s]);
  }
  const bool past_caches = blocks.elements() >= kStreamFrom;
  const auto step_block = [&](int64_t s, int64_t offset, int64_t n, int64_t) {
    const Span& span = spans[s];
    const float multiplier = record.multiplier * static_cast<float>(*table.row(s));
    Outgoing outgoing(span, offset, sinks);
    constexpr bool kMoves = !Rule::kNeedsNorms;  // else the first pass has moved the moments on
    with_decoded<Rule::kMoments, kMoves>(
        outgoing.written(), offset, n, 0.0f, [&](const Span& seen, auto begin, auto k) {
          with_streams<Rule>(seen, [&](const auto& streams) {
            update(rules[s], streams, multiplier, begin, k, past_caches && !sinks.count && streams.aligned());
          });
        });
    if (sinks.count) outgoing.send(n, past_caches);
    if (after == Afterwards::kReset) reset(span, offset, n);
    if (after == Afterwards::kWritten) write_unscaled(span, offset, n, record.multiplier);
  };
  // Stores past the caches are ordered with nothing; whoever reads the weights next waits for a barrier only.
  blocks.parallel_for(step_block, [] { order_past_caches(); });
}

// Moves the moments on, where those of a whole group have to be known before one of them can be stored.
template <class Rule, class Streams>
void move(const Rule rule, const Streams s, float multiplier, int64_t begin, int64_t n) {
  for_each(
      n, [&](int64_t k) { s.template ask_ahead<true>(begin + k); },
      [&](int64_t k, auto v) {
        auto x = s.template load<true>(begin + k, v);
        with_moments(x, [&](auto&... moment) { return rule.direct(x.p, x.g * multiplier, moment...); });
        s.store_moments(x, begin + k);
      });
}

// The first pass of a rule that needs norms: moves the moments on (unless they have been moved), and measures.
template <class Rule, class Streams>
Norms measure(const Rule rule, const Streams s, float multiplier, int64_t begin, int64_t n, bool moved) {
  alignas(64) float params[kLanes] = {}, directions[kLanes] = {};
  Pack largest_param = 0.0f, largest_direction = 0.0f;
  const bool rounds = s.rounds_moments();
  for_each<false>(
      n, [&](int64_t k) { s.template ask_ahead<true>(begin + k); },
      [&](int64_t k, auto v) {
        auto x = s.template load<true>(begin + k, v);
        auto r = x.p;
        if (!moved) {
          r = with_moments(x, [&](auto&... moment) { return rule.direct(x.p, x.g * multiplier, moment...); });
          s.store_moments(x, begin + k);
        }
        if (moved || rounds) {  // what is measured is what the second pass will take
          x = s.template load<false>(begin + k, v);
          r = with_moments(x, [&](auto&... moment) { return rule.direction(x.p, moment...); });
        }
        add_squares(x.p, k, params, largest_param);
        add_squares(r, k, directions, largest_direction);
      });
  const auto again = [&](int64_t k) { return s.template load<false>(begin + k, 0.0f); };
  return {
      total(params, largest_param, n, [&](int64_t k) { return again(k).p; }),
      total(directions, largest_direction, n,
            [&](int64_t k) {
              const auto x = again(k);
              return with_moments(x, [&](auto&... moment) { return rule.direction(x.p, moment...); });
            }),
  };
}

template <class Rule>
void norms_with(const Table& table, const StepRecord& record, Norms* partial) {
  const Span* spans = table.spans;
  const Blocks blocks(spans, table.count);
  std::fill(partial, partial + blocks.size(), Norms());
  if (record.skipped()) return;
  std::vector<Rule> rules(table.count);
  for (int64_t s = 0; s < table.count; ++s) rules[s] = table.same(s) ? rules[s - 1] : table.prepare<Rule>(s, 1.0f);
  blocks.parallel_for([&](int64_t s, int64_t offset, int64_t n, int64_t block) {
    const Span& span = spans[s];
    const float multiplier = record.multiplier * static_cast<float>(*table.row(s));
    const bool grouped = has_grouped(span, Rule::kMoments);
    if (grouped) {
      with_decoded<Rule::kMoments, true>(span, offset, n, 1.0f, [&](const Span& seen, auto begin, auto k) {
        with_streams<Rule>(seen, [&](const auto& streams) { move(rules[s], streams, multiplier, begin, k); });
      });
    }
    static_assert(kStepBlock <= kStretch);
    with_decoded<Rule::kMoments, false>(span, offset, n, 0.0f, [&](const Span& seen, auto begin, auto k) {
      partial[block] = with_streams<Rule>(
          seen, [&](const auto& streams) { return measure(rules[s], streams, multiplier, begin, k, grouped); });
    });
  });
}

struct Entry {
  decltype(&step_with<SGD<false>>) step;
  decltype(&norms_with<LAMB>) norms;  // null where the rule needs none
};

template <class Rule>
constexpr Entry entry() {
  Entry result = {&step_with<Rule>, {}};
  if constexpr (Rule::kNeedsNorms) result.norms = &norms_with<Rule>;
  return result;
}

#define DEEPFAST_ENTRY(name, Rule) entry<Rule>(),
constexpr Entry kEntries[] = {DEEPFAST_RULES(DEEPFAST_ENTRY)};
#undef DEEPFAST_ENTRY

}  // namespace

void norms(int rule, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
           const StepRecord& record, Norms* out) {
  const Blocks blocks(spans, count);
  std::vector<Norms> partial(blocks.size());
  norms_of_blocks(rule, spans, count, hyper, hyper_stride, record, partial.data());
  for (int64_t s = 0; s < count; ++s) {
    out[s] = fold<Norms>(partial.data() + blocks.first(s), blocks.first(s + 1) - blocks.first(s));
  }
}

void norms_of_blocks(int rule, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
                     const StepRecord& record, Norms* out) {
  kEntries[rule].norms({spans, count, hyper, hyper_stride}, record, out);
}

void step(int rule, const Span* spans, int64_t count, const double* hyper, int64_t hyper_stride,
          const StepRecord& record, const Norms* norms, Afterwards after, const Sinks& sinks) {
  kEntries[rule].step({spans, count, hyper, hyper_stride}, record, norms, after, sinks);
}

}  // namespace deepfast::cpu
