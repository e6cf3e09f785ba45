#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

// y = act(weight (x - mean) / sqrt(var + eps) + bias + residual), act = ReLU or nothing, over `rows` of adjacent
// channels; mean and biased variance of each channel over the rows. x, residual and y are of type `dtype`.
struct BatchNormAct {
    const void *x, *residual;  // residual may be null
    int64_t rows, channels;
    Dtype dtype;
    const float *weight, *bias;  // [channels] or null for 1 and 0
    float eps;
    bool relu;
    void* y;
    float *mean, *var;  // [channels]
};

// Its gradients. Where a ReLU stands behind and y is null, y > 0 is taken from x again, which is right if there was no
// residual. passed receives the gradient behind the ReLU and is null where nobody asks for it; it needs y.
struct BatchNormActGradient {
    const void *grad, *x, *y;
    int64_t rows, channels;
    Dtype dtype;
    const float *weight, *bias, *mean, *var;
    float eps;
    bool relu;
    void *out, *passed;
    float *grad_weight, *grad_bias;  // [channels]
};

void batch_norm_act(const BatchNormAct& call, int threads);
void batch_norm_act_backward(const BatchNormActGradient& call, int threads);

}  // namespace kr
