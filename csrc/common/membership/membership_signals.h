#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

// One output array each, null where not requested: kr_fast/ops/membership/membership_signals.py.
struct SignalOutputs {
    float *phi, *loss, *entropy, *modified_entropy, *confidence, *correct;
};

// Statistics of the rows of logits.
struct MembershipSignals {
    const void* logits;  // [rows, classes], rows `stride` elements apart; f32 on a CPU
    Dtype dtype;
    int64_t rows, classes, stride;
    const int64_t* labels;  // [rows]
    SignalOutputs out;
};

}  // namespace kr
