#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

// x (before the norm) and grad: [records, rows, size] each, of type dtype.
struct LayerNormGradNorms {
    const void *x, *grad;
    int64_t records, rows, size;
    Dtype dtype;
    float eps;
    bool with_bias;        // whether the norm is of weight and bias together
    float* norms;          // [records] or null
    float *weight, *bias;  // the gradients, [records, size] each, or null
};

void layer_norm_grad_norms(const LayerNormGradNorms& call, int threads);

}  // namespace kr
