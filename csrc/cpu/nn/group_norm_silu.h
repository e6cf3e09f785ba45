#pragma once
#include "common/nn/group_norm_silu.h"

namespace kr {

// What a forward pass keeps for its backward, [batch, groups] each; null where there will be none.
struct GroupNormStatistics {
    float *mean, *rstd;
};

// In the place of SiLU, of float32 without skip: y = max(z + residual, 0) of the norm z.
struct GroupNormRelu {
    const float* residual;  // of y's shape and order, or null
};

// Of a call whose y is not used: grad has y's shape, type and order, out and skip_out those of x and skip.
struct GroupNormGradient {
    const void* grad;
    const float *mean, *rstd;        // of GroupNormStatistics
    void *out, *skip_out;            // skip_out null without skip
    float* grad_shift;               // [batch, channels] or null
    float *grad_weight, *grad_bias;  // [channels]
    float* samples;                  // [batch, 2, channels], weight's and bias's apart by sample: then not those above
    // Of a pass with ReLU, of y's shape and order: y, or null; and the gradient of z + residual, or null.
    const float* made;
    float* passed;
};

void group_norm_silu(const GroupNorm& call, const GroupNormStatistics& out, int threads);
void group_norm_relu(const GroupNorm& call, const GroupNormRelu& relu, const GroupNormStatistics& out, int threads);
void group_norm_silu_backward(const GroupNorm& call, const GroupNormGradient& grads, int threads);

}  // namespace kr
