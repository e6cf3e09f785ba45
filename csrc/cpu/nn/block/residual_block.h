#pragma once
#include <cstdint>

namespace kr {

// y = relu(norm(conv3x3(t)) + s), t = relu(norm(conv3x3(x))), s = x or norm(conv1x1(x)), NHWC: the first 3x3 and the
// 1x1 convolution have the stride. Layers are numbered in the order conv1, conv2, shortcut. Channels are multiples
// of 16.
struct ResidualBlock {
    const float* x;  // [batch, height, width, inputs]
    int64_t batch, height, width, inputs, outputs, stride;
    bool projection;                             // whether the shortcut is a layer
    bool winograd[3];                            // else by the definition
    const float* weight[3];                      // [outputs, inputs, kernel, kernel], outputs outermost
    int64_t input_step[3], tap_step[3];          // of weight
    const double* transform;                     // G of winograd_pack
    const float *norm_weight[3], *norm_bias[3];  // [outputs] or null for 1 and 0
    float *running_mean[3], *running_var[3];     // [outputs] or null, updated
    float momentum[3], eps[3];
    // What backward reads, written by forward:
    float* convolved;   // [layers][batch, rows, columns, outputs]: what stands before the norms
    float* statistics;  // [layers][mean, biased variance][outputs]
    uint8_t* positive;  // a bit of each number of y: whether it passed the ReLU
    float* y;           // [batch, rows, columns, outputs]
};

struct ResidualBlockGradient {
    const float* grad;      // of y's shape
    float* grad_x;          // null where it is not asked for
    float* grad_weight[3];  // in the layout of the weight
    float* grad_norm;       // [layers][weight, bias][outputs]
};

void residual_block(const ResidualBlock& call, int threads);
// By the running statistics, which stay as they are: only y is written.
void residual_block_inference(const ResidualBlock& call, int threads);
void residual_block_backward(const ResidualBlock& call, const ResidualBlockGradient& gradient, int threads);

}  // namespace kr
