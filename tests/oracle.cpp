// The formulas of csrc/math, one element after the other: what every vectorized loop must agree with to the last bit.
#include <cstring>

#include "../csrc/math/rules.h"

namespace {

using namespace deepfast;

struct Arguments {
  int64_t n;
  float *p, *g, *moment[3], *step;
  const double* hyper;  // without the sign
  float multiplier;
  const double* norms;
};

template <class Rule, class... Moment>
void run(const Arguments& a, Moment... moment) {
  if (Rule::kCountsSteps) *a.step += 1.0f;
  Rule rule = Rule::prepare(a.hyper, Rule::kCountsSteps ? static_cast<int64_t>(*a.step) : 0);
  if constexpr (Rule::kNeedsNorms) {
    for (int64_t i = 0; i < a.n; ++i) rule.direct(a.p[i], a.g[i] * a.multiplier, moment[i]...);
    rule.adapt({a.norms[0], a.norms[1]});
  }
  for (int64_t i = 0; i < a.n; ++i) a.p[i] = rule.update(a.p[i], a.g[i] * a.multiplier, moment[i]...);
}

template <class Rule>
void dispatch(const Arguments& a) {
  if constexpr (Rule::kMoments == 0) run<Rule>(a);
  if constexpr (Rule::kMoments == 1) run<Rule>(a, a.moment[0]);
  if constexpr (Rule::kMoments == 2) run<Rule>(a, a.moment[0], a.moment[1]);
  if constexpr (Rule::kMoments == 3) run<Rule>(a, a.moment[0], a.moment[1], a.moment[2]);
}

}  // namespace

extern "C" int oracle_step(const char* name, int64_t n, float* p, float* g, float* m0, float* m1, float* m2,
                           float* step, const double* hyper, float multiplier, const double* norms) {
  const Arguments arguments = {n, p, g, {m0, m1, m2}, step, hyper, multiplier, norms};
#define TRY(rule, Rule) \
  if (std::strcmp(name, rule) == 0) return dispatch<Rule>(arguments), 1;
  DEEPFAST_RULES(TRY)
  return 0;
}
