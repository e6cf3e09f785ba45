#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {
namespace cuda {

// As cpu/group_norm_silu.h: u = [x, skip] + shift, y = act(weight (u - mean_g) rstd_g + bias), channels innermost.
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

// A cudaError_t.
int group_norm_silu(const GroupNorm& call, void* cuda_stream);

}  // namespace cuda
}  // namespace kr
