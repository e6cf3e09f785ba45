#pragma once
#include <cstdint>

#include "common/distillation/distillation_loss.h"

namespace kr {

// Each [rows]; the last three are null without labels.
struct MetricOutputs {
    float* kl;
    uint8_t* agreement;
    float *teacher_confidence, *teacher_entropy, *cross_entropy;
    uint8_t *student_correct, *teacher_correct;
};

// The formulas stand in kr_fast/ops/distillation/distillation_metrics.py. A row with a label outside [0, classes) has
// no cross_entropy and is not correct.
struct DistillationMetrics : LogitPair, MetricOutputs {
    float temperature;
};

void distillation_metrics(const DistillationMetrics& call, int threads);

}  // namespace kr
