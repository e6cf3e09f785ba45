#pragma once

namespace kr {

// Statistics of the rows of logits, one output array each, null where unwanted:
// kr_fast/ops/membership/membership_signals.py.
struct SignalOutputs {
    float *phi, *loss, *entropy, *modified_entropy, *confidence, *correct;
};

}  // namespace kr
