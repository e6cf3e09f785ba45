// One call of the distillation loss, for host and device.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

enum class TargetKind : int { logits = 0, probs = 1, log_probs = 2 };  // top-k rows are probs

enum class Divergence : int {
    kl = 0,
    cross = 1,      // -p ln q, soft_cross_entropy
    decoupled = 2,  // of the label against the rest, and within the rest: dkd_loss. Teacher logits, labels, soft = 1
};

// kr_fast/backends/distillation.py fills it, once per set of options.
struct LossOptions {
    float temperature, soft, hard, smoothing;
    int64_t ignore_index;
    TargetKind target_kind;
    bool smooth_tail;  // the rest of a top-k row's mass is spread over its other classes, else the row is renormalised
    Divergence divergence;
    float alpha, beta;  // of Divergence::decoupled
    bool mean;  // loss and gradient are divided by the sum of the weights of the rows that count (0 if there is none)
};

// The same rows of student and teacher, of stride 1 inside.
struct LogitPair {
    const void* input;   // student logits
    const void* target;  // teacher
    Dtype input_dtype, target_dtype;
    int64_t rows, classes, input_stride, target_stride;
    const int64_t* labels;  // or null
};

// One call of the loss; the formula stands in kr_fast/ops/distillation/distillation_loss.py.
struct DistillationLoss : LossOptions, LogitPair {
    const float* weight;     // or null
    const int64_t* indices;  // null, or [rows, top_k] contiguous: target holds the probabilities of these classes only
    int64_t top_k;
};

}  // namespace kr
