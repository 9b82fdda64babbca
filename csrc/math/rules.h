// The table of update rules: the name that Python uses, and the formula. One line a rule, for every backend.
//
// A rule says how many moments it keeps and how many hyperparameters it takes, whether it counts steps, and whether it
// needs norms of whole parameters (then it has two passes: lamb.h).
#pragma once

#include <cstring>

#include "adagrad.h"
#include "adam.h"
#include "lamb.h"
#include "lion.h"
#include "sgd.h"

#define DEEPFAST_RULES(RULE)       \
  RULE("adam", Adam<false>)        \
  RULE("adam_amsgrad", Adam<true>) \
  RULE("sgd", SGD<false>)          \
  RULE("sgd_momentum", SGD<true>)  \
  RULE("lion", Lion)               \
  RULE("lamb", LAMB)               \
  RULE("adagrad", Adagrad)

namespace deepfast {

// What the rule called `name` keeps and takes.
struct RuleInfo {
  const char* name;
  int moments;
  int hyper;  // values in a row of the hyperparameter table, the gradient's sign included
  bool counts_steps, needs_norms;
};

#define DEEPFAST_INFO(name, Rule) {name, Rule::kMoments, 1 + Rule::kHyper, Rule::kCountsSteps, Rule::kNeedsNorms},
constexpr RuleInfo kRules[] = {DEEPFAST_RULES(DEEPFAST_INFO)};
#undef DEEPFAST_INFO

// The rule's row in the table; -1 if there is no such rule.
inline int find_rule(const char* name) {
  for (const RuleInfo& rule : kRules) {
    if (std::strcmp(rule.name, name) == 0) return static_cast<int>(&rule - kRules);
  }
  return -1;
}

}  // namespace deepfast
