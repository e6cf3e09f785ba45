#pragma once
#include <cstdint>

namespace kr {

// Sorts scores from high to low and counts. For each distinct score: tp, fp = members, others at or above it, and
// threshold = the score. Returns the number of distinct scores. Ties are one point, so nothing depends on their order.
int64_t roc(const double* scores, const uint8_t* members, int64_t n, double* thresholds, int64_t* tp, int64_t* fp);

}  // namespace kr
