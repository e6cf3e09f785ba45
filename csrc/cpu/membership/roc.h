#pragma once
#include <cstdint>

namespace kr {

// Sorts scores from high to low and counts. For each distinct score: tp, fp = members, others at or above it, and
// threshold = the score. Returns the number of distinct scores. Ties are one point, so nothing depends on their order.
int64_t roc(const double* scores, const uint8_t* members, int64_t n, double* thresholds, int64_t* tp, int64_t* fp);

// The threshold of largest TPR - FPR, the highest where several are, on values [examples, models] of which those with
// held = 1 are members'. all: one threshold for all models. Otherwise threshold[k] is that without model k, [models].
// NaN where there is no member or no other. No NaN among the values. The rates are divided and subtracted in double.
void best_threshold(const double* values, const uint8_t* held, int64_t examples, int64_t models, bool all,
                    double* threshold, int threads);

}  // namespace kr
