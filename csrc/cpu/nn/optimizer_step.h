#pragma once
#include <cstdint>

namespace kr {

constexpr int kOptimizerNumbers = 5;  // of a group: see optimizer_step.cpp

// A step of SGD or AdamW over many tensors of float32, each of them one run of memory. A column of `table` holds of a
// tensor: how many numbers, the group, and the addresses of parameter, first moment (null: none), second moment,
// count of steps (AdamW's: one float) and moving average (null: none).
struct OptimizerStep {
    int64_t tensors;
    const int64_t* table;       // [7, tensors]
    const float* const* grads;  // [tensors]; null: not in this step
    const double* groups;       // [groups, kOptimizerNumbers]
    bool adamw;
    double max_norm;
    double average_weight;  // of the new parameter in its average
};

// The norm of all gradients; if it is not finite, nothing has been written.
double optimizer_step(const OptimizerStep& call, int threads);

}  // namespace kr
