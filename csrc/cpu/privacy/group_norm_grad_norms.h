#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

// x (before the norm) and grad: records * rows images, NHWC where channels_last, else NCHW; `rows` images make a
// record.
struct GroupNormGradNorms {
    const void *x, *grad;
    int64_t records, rows, channels, pixels, groups;
    Dtype dtype;
    bool channels_last;
    float eps;
    float* norms;          // [records], of weight and bias together, or null
    float *weight, *bias;  // the gradients, [records, channels] each, or null
};

void group_norm_grad_norms(const GroupNormGradNorms& call, int threads);

}  // namespace kr
