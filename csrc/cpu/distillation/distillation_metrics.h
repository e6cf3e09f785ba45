#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

// Two sets of logits of the same rows; the formulas stand in kr_fast/ops/distillation/distillation_metrics.py.
struct DistillationMetrics {
    const void *input, *target;
    Dtype input_dtype, target_dtype;
    int64_t rows, classes, input_stride, target_stride;
    const int64_t* labels;  // or null; a row with a label outside [0, classes) has no cross_entropy and is not correct
    float temperature;
    float *kl, *cross_entropy, *teacher_confidence, *teacher_entropy;  // [rows]; cross_entropy null without labels
    uint8_t *agreement, *student_correct, *teacher_correct;            // [rows]; the last two null without labels
};

void distillation_metrics(const DistillationMetrics& call, int threads);

}  // namespace kr
