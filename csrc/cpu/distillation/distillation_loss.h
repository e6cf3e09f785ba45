#pragma once
#include <cstdint>

#include "common/distillation/distillation_loss.h"

namespace kr {

// What is requested of a call. Loss and gradient together cost one pass; each alone costs less.
struct DistillationRequest {
    bool loss;
    float* row_loss;        // weighted losses [rows], or null
    void* grad;             // [rows, classes] contiguous, of input's dtype, or null
    const float* upstream;  // d result / d loss of row i at upstream[i * upstream_step]; null stands for 1
    int64_t upstream_step;
};

struct DistillationResult {
    double loss;  // over all rows
    // The first row whose label is neither in [0, classes) nor ignore_index, or that has an index outside: then nothing
    // is done. -1 if there is none.
    int64_t invalid;
};

// Rows are summed in fixed blocks, so the result does not depend on the number of threads.
DistillationResult distillation_loss(const DistillationLoss& call, const DistillationRequest& request, int threads);

}  // namespace kr
