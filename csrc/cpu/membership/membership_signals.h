#pragma once
#include <cstdint>

#include "common/membership/membership_signals.h"

namespace kr {

// Of each row of logits [rows, classes] (row stride `stride`).
void membership_signals(const float* logits, int64_t rows, int64_t classes, int64_t stride, const int64_t* labels,
                        const SignalOutputs& out, int threads);

}  // namespace kr
