#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

// One call of the loss; the formula stands in kr_fast/ops/distillation_loss.py. Rows have stride 1 inside.
struct DistillationLoss {
    const void* input;   // student logits
    const void* target;  // teacher
    Dtype input_dtype, target_dtype;
    int64_t rows, classes, input_stride, target_stride;
    const int64_t* labels;  // or null
    const float* weight;    // or null
    float temperature, soft, hard, smoothing;
    int64_t ignore_index;
    int target_kind;  // 0 logits, 1 probabilities, 2 log-probabilities
};

constexpr int kLossStats = 5;  // a row's max and ln sum of the student (at T), of the teacher (at T), and ln sum at 1

// row_loss[rows] (weighted), stats[rows, kLossStats], and over all rows total[0] = sum of losses, total[1] = of weights.
// Rows are summed in fixed blocks, so the result does not depend on the number of threads. Returns the first row whose
// label is neither in [0, classes) nor ignore_index, or -1.
int64_t distillation_forward(const DistillationLoss& call, float* row_loss, float* stats, double total[2], int threads);

// grad_input[rows, classes] contiguous, of input's dtype: upstream[row * upstream_step] * scale * d row_loss / d input.
void distillation_backward(const DistillationLoss& call, const float* stats, const float* upstream,
                           int64_t upstream_step, float scale, void* grad_input, int threads);

}  // namespace kr
