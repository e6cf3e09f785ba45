// One call of group_norm_silu, on the host and on the device.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

// u = [x, skip] + shift over C = x_channels + skip_channels channels; y = act(weight (u - mean_g) rstd_g + bias).
// x, skip (null with 0 channels) and y are pixels of adjacent channels (NHWC) and of type `dtype`. weight and bias are
// [C] of type `affine_dtype` or null; shift is [batch, C] of type `shift_dtype`, rows shift_stride apart, or null.
struct GroupNorm {
    const void *x, *skip;
    int64_t batch, pixels, x_channels, skip_channels;
    Dtype dtype;
    const void *weight, *bias;
    Dtype affine_dtype;
    const void* shift;
    Dtype shift_dtype;
    int64_t shift_stride, groups;
    float eps;
    bool silu;
    void* y;
};

}  // namespace kr
