#pragma once
#include <cstdint>

namespace kr {

// A convolution by its definition (dilation 1, one group), NHWC:
//   y[n, i, j, o] = bias[o] + sum_{k, l, c} w[o, c, k, l] x[n, i stride - pad + k, j stride - pad + l, c]
// with zeros outside of x. Output pixels are (size + 2 pad - kernel) / stride + 1 of each axis.
struct DirectConvShape {
    int64_t height, width, inputs, output_height, output_width, outputs;
    int64_t kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x;
};

// Filters or their gradient, [outputs, inputs, kernel height, kernel width] in any layout whose taps lie equally far
// apart: floats from one output, input and tap to the next.
struct DirectConvSteps {
    int64_t output, input, tap;
};

// Every function below but the two with `threads` runs on the calling thread, allocates nothing and works on images
// [begin, end) of the batch, so that a caller can go through a network group by group. What it computes for an image
// has the same bits whatever the range. Packed filters, sums and scratch should lie on 64 bytes.

// Floats of packed filters, for the forward pass or for the gradient of the input.
int64_t direct_conv2d_packed_size(const DirectConvShape& shape, bool grad_input);
void direct_conv2d_pack(const DirectConvShape& shape, const float* weight, const DirectConvSteps& steps,
                        bool grad_input, float* packed);

// bias is [outputs] or null.
void direct_conv2d_images(const DirectConvShape& shape, const float* x, const float* packed, const float* bias,
                          float* y, int64_t begin, int64_t end);

// All of grad_x is written; with `accumulate` the gradient is added to what it holds.
void direct_conv2d_grad_input_images(const DirectConvShape& shape, const float* grad_y, const float* packed,
                                     float* grad_x, bool accumulate, int64_t begin, int64_t end);

// The gradient of the filters, and of the bias where `bias` is set, as sums over images: direct_conv2d_sums floats,
// which the first group of images (`first`) sets and each further one adds to. Groups in the same order give the same
// bits; other groups are another order of summation. `scratch` is direct_conv2d_scratch floats of the caller's.
int64_t direct_conv2d_sums(const DirectConvShape& shape);
int64_t direct_conv2d_scratch(const DirectConvShape& shape);
void direct_conv2d_grad_weight_images(const DirectConvShape& shape, const float* x, const float* grad_y, bool bias,
                                      int64_t begin, int64_t end, float* sums, bool first, float* scratch);
// Adds `chunks` such sums, `chunk_step` floats apart, in their order and writes the gradient; grad_bias may be null.
void direct_conv2d_grad_weight_finish(const DirectConvShape& shape, const float* sums, int64_t chunks,
                                      int64_t chunk_step, float* grad_weight, const DirectConvSteps& steps,
                                      float* grad_bias);

// The sum of the squares of the gradient that such sums are.
double direct_conv2d_grad_weight_square(const DirectConvShape& shape, const float* sums);

// The whole batch on up to `threads` threads, with the same bits for any number of them.
struct DirectConv {
    DirectConvShape shape;
    int64_t batch;
    const float* x;
    const float* weight;
    DirectConvSteps steps;
    const float* bias;  // [outputs] or null
    float* y;
};
void direct_conv2d(const DirectConv& call, int threads);

struct DirectConvBackward {
    DirectConvShape shape;
    int64_t batch;
    const float* x;       // null without grad_weight
    const float* weight;  // null without grad_x
    DirectConvSteps steps;
    const float* grad_y;
    float* grad_x;       // null where it is not asked for
    float* grad_weight;  // null where it is not asked for
    DirectConvSteps grad_steps;
    float* grad_bias;  // null where it is not asked for
};
void direct_conv2d_backward(const DirectConvBackward& call, int threads);

}  // namespace kr
