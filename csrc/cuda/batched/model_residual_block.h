#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {
namespace cuda {

// y = act(conv2(relu(conv1(p) + bias1)) + bias2 + x) for each model, channels innermost: two 3x3 convolutions of as
// many channels out as in, zeros around. p = x, or relu(scale x + shift). float16 or bfloat16, sums in float32; p and
// what lies between the convolutions are rounded. Addresses of halves are multiples of 16.
struct ResidualBlock {
    const void* x;                  // [models, images, height, width, channels]
    const void *weight1, *weight2;  // [models, channels, 3, 3, channels]
    const float *bias1, *bias2;     // [models, channels], or null
    const float *scale, *shift;     // [models, channels], or both null
    bool bf16;
    int64_t models, images;
    int height, width, channels;
    bool relu;  // act is a ReLU, or nothing
    void* y;
};

// The most images that a block of threads takes at once on the current device; 0 where not even one fits it.
int residual_block_images(int channels, int height, int width);

// A cudaError_t.
int model_residual_block(const ResidualBlock& call, void* cuda_stream);

}  // namespace cuda
}  // namespace kr
