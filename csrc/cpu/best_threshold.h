#pragma once
#include <cstdint>

namespace kr {

// The threshold of largest TPR - FPR, the highest where several are, on values [examples, models] of which those with
// held = 1 are members'. all: one threshold for all models. Otherwise threshold[k] is that without model k, [models].
// NaN where there is no member or no other. No NaN among the values. The rates are divided and subtracted in double.
void best_threshold(const double* values, const uint8_t* held, int64_t examples, int64_t models, bool all,
                    double* threshold, int threads);

}  // namespace kr
