// The table of update rules: the name that Python uses, and the formula. One line a rule, for every backend.
//
// A rule says how many moments it keeps and how many hyperparameters it takes, whether it counts steps, and whether it
// needs norms of whole parameters (then it has two passes: lamb.h).
#pragma once

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
