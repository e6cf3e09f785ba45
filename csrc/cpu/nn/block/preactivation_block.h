#pragma once
#include <cstdint>

namespace kr {

// y = conv3x3(t) + s, t = silu(norm(conv3x3(silu(norm(u))) + shift)), u = [x, skip], s = u or conv1x1(u), NHWC: norms
// are group norms, convolutions have stride 1 and a border of one zero. Layers are numbered in the order conv1, conv2,
// shortcut; norms stand before the first two.
struct PreactivationBlock {
    const float *x, *skip;  // [batch, height, width, x_channels or skip_channels]; skip null with 0 channels
    int64_t batch, height, width, x_channels, skip_channels, outputs;
    const float *norm_weight[2], *norm_bias[2];  // [channels of u], [outputs]
    int64_t groups[2];
    float eps[2];
    const float* shift;  // [batch, outputs], rows shift_stride apart, or null
    int64_t shift_stride;
    bool projection;         // whether the shortcut is a convolution
    const float* weight[3];  // [outputs, inputs, 3, 3] or [outputs, inputs]
    int64_t input_step[3], tap_step[3];
    const float* bias[3];     // [outputs] or null
    const double* transform;  // G of winograd_pack
    // What backward reads, written by forward:
    float *first, *second;  // what the 3x3 convolutions read
    float* convolved;       // of y's shape: what stands before the shift
    float* statistics;      // [mean, 1 / deviation of norm 1, then of norm 2], each [batch, groups]
    float* y;               // [batch, height, width, outputs]
};

struct PreactivationBlockGradient {
    const float* grad;  // of y's shape
    float *grad_x, *grad_skip;
    float* grad_shift;      // [batch, outputs]
    float* grad_weight[3];  // in the layout of the weight
    float* grad_bias[3];    // [outputs]
    float *grad_norm_weight[2], *grad_norm_bias[2];
};

void preactivation_block(const PreactivationBlock& call, int threads);
void preactivation_block_backward(const PreactivationBlock& call, const PreactivationBlockGradient& out, int threads);

}  // namespace kr
