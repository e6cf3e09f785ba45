#pragma once
#include <cstdint>

namespace kr {

// Scores from high to low, counted. For each distinct score: tp, fp = members, others at or above it, and threshold =
// the score. Ties are one point, so nothing depends on their order.
struct Roc {
    const double* scores;    // [n]
    const uint8_t* members;  // [n]
    int64_t n;
    double* thresholds;  // [n], of which the first results are written, as in tp and fp
    int64_t *tp, *fp;
};

int64_t roc(const Roc& call);  // returns the number of distinct scores

// The threshold of largest TPR - FPR, the highest where several are; NaN where there is no member or no other. The
// rates are divided and subtracted in double.
struct BestThreshold {
    const double* values;    // [examples, models], no NaN
    const uint8_t* members;  // [examples, models]
    int64_t examples, models;
    bool leave_out;      // threshold[k] is that without model k, else there is one for all models
    double* thresholds;  // [models] or [1]
};

void best_threshold(const BestThreshold& call, int threads);

}  // namespace kr
