#pragma once
#include <cstdint>

#include "common/membership/lira.h"

namespace kr {

// Likelihood-ratio scores, higher for members. phi: [queries, examples, models], keep: [models, examples] (1 = in).
// target: [queries, examples, targets] of models outside phi, or null: then every model of phi is a target, scored
// against the others (leave one out). scores: [targets, examples].
// Returns how many (target, example) pairs had too few shadows on a side; their score is 0 (no evidence).
int64_t lira(const float* phi, const uint8_t* keep, const float* target, int64_t queries, int64_t examples,
             int64_t models, int64_t targets, bool online, Variance variance, double* scores, int threads);

}  // namespace kr
