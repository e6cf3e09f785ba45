#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

enum class Divergence : int {
    kl = 0,
    cross = 1,      // -p ln q, soft_cross_entropy
    decoupled = 2,  // of the label against the rest, and within the rest: dkd_loss. Teacher logits, labels, soft = 1
};

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
    int target_kind;         // 0 logits, 1 probabilities, 2 log-probabilities
    const int64_t* indices;  // null, or [rows, top_k] contiguous: target holds the probabilities of these classes only
    int64_t top_k;
    bool smooth_tail;  // the rest of such a row's mass is spread over its other classes, else the row is renormalised
    Divergence divergence;
    float alpha, beta;  // of Divergence::decoupled
};

// What is wanted of a call. Loss and gradient together cost one pass; each alone costs less.
struct DistillationWanted {
    bool loss;
    float* row_loss;        // weighted losses [rows], or null
    void* grad;             // [rows, classes] contiguous, of input's dtype, or null
    const float* upstream;  // d result / d loss of row i at upstream[i * upstream_step]; null stands for 1
    int64_t upstream_step;
    bool mean;  // divide loss and gradient by the sum of the weights of the rows that count (0 if there is none)
};

struct DistillationResult {
    double loss;      // over all rows
    // The first row whose label is neither in [0, classes) nor ignore_index, or that has an index outside: then nothing
    // is done. -1 if there is none.
    int64_t invalid;
};

// Rows are summed in fixed blocks, so the result does not depend on the number of threads.
DistillationResult distillation_loss(const DistillationLoss& call, const DistillationWanted& wanted, int threads);

}  // namespace kr
