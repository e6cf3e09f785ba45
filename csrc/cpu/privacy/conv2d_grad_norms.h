#pragma once
#include <cstdint>

namespace kr {

// Per-sample gradients of a convolution's parameters, NHWC:
//   dw_b[o, c, k, l] = sum over images of b, i, j: x[i stride - pad + k dilation, j stride - pad + l dilation, c] dy[i,
//   j, o]
// with zeros outside of x, where `images` consecutive images belong to a record. pad is above and left.
struct ConvGradients {
    const float* x;            // [records, images, height, width, inputs]
    const float* grad_output;  // [records, images, output height, output width, outputs]
    int64_t records, images, height, width, inputs, output_height, output_width, outputs;
    int64_t kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups;
    float* norms;   // [records]: of weight and, with `bias`, bias together; or null
    float* weight;  // [records, outputs, inputs / groups, kernel height, kernel width], or null: then norms alone
    float* bias;    // [records, outputs] beside weight, or null
    bool with_bias;
};
void conv2d_grad_norms(const ConvGradients& call, int threads);

}  // namespace kr
