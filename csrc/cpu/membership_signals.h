#pragma once
#include <cstdint>

namespace kr {

// Statistics of each row of logits [rows, classes] (row stride `stride`), one output array each, null where unwanted.
struct SignalOutputs {
    float *phi, *loss, *entropy, *modified_entropy, *confidence, *correct;
};
void membership_signals(const float* logits, int64_t rows, int64_t classes, int64_t stride, const int64_t* labels,
                        const SignalOutputs& out, int threads);

}  // namespace kr
