// One call of the distillation loss, for host and device.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

enum class Divergence : int {
    kl = 0,
    cross = 1,      // -p ln q, soft_cross_entropy
    decoupled = 2,  // of the label against the rest, and within the rest: dkd_loss. Teacher logits, labels, soft = 1
};

// One call of the loss; the formula stands in kr_fast/ops/distillation/distillation_loss.py. Rows have stride 1 inside.
struct DistillationLoss {
    const void* input;   // student logits
    const void* target;  // teacher
    Dtype input_dtype, target_dtype;
    int64_t rows, classes, input_stride, target_stride;
    const int64_t* labels;  // or null
    const float* weight;    // or null
    float temperature, soft, hard, smoothing;
    int64_t ignore_index;
    int target_kind;         // 0 logits, 1 probabilities, 2 log-probabilities
    const int64_t* indices;  // null, or [rows, top_k] contiguous: target holds the probabilities of these classes only
    int64_t top_k;
    bool smooth_tail;  // the rest of such a row's mass is spread over its other classes, else the row is renormalised
    Divergence divergence;
    float alpha, beta;  // of Divergence::decoupled
};

}  // namespace kr
