#pragma once
#include <cstdint>

namespace kr {

enum class Activation { none, relu, gelu, silu };

// y = act(scale * pool(conv(x)) + bias + residual): a 3x3 convolution of stride 1 with a border of one zero, NHWC.
// pool is the largest of 2x2 pixels without overlap (a last odd row or column is dropped) or nothing.
struct WinogradConv {
    const float* x;  // [batch, height, width, inputs]
    int64_t batch, height, width, inputs;
    const float* weight;  // transformed: [36, ceil(outputs / block), ceil(inputs / 16) 16, block], see winograd_block
    const float *scale, *bias;  // [outputs] or null for 1 and 0
    const float* residual;      // of y's shape or null
    Activation activation;
    bool pool;
    float* y;  // [batch, height, width, outputs], or [batch, height / 2, width / 2, outputs]; may be the residual
    int64_t outputs;
    const uint8_t* residual_bits;  // null, or a bit of each number of the residual: whether it counts. 16 n outputs
};

// Outputs of a block of the transformed weight.
inline int64_t winograd_block(int64_t outputs) { return outputs <= 16 ? 16 : 32; }

// Tiles that are transformed together, a multiple of the rows of every product, and blocks of outputs whose products
// are in the cache together.
constexpr int64_t kWinogradTiles = 42, kWinogradPart = 2;

// Floats between places of the transformed pixels of kWinogradTiles tiles.
inline int64_t winograd_step(int64_t inputs) { return ((inputs + 15) / 16 * kWinogradTiles + 1) * 16; }

void winograd_conv2d(const WinogradConv& call, int threads);

// The same by one thread, in `scratch` of so many floats, at a multiple of 64 bytes.
int64_t winograd_scratch(int64_t inputs, int64_t outputs);
void winograd_conv2d_within(const WinogradConv& call, float* scratch);

// The gradient of the filters of such a convolution, and of its bias.
struct WinogradGradWeight {
    const float* x;            // [batch, height, width, inputs]
    const float* grad_output;  // [batch, height, width, outputs]
    int64_t batch, height, width, inputs, outputs;
    float* grad_weight;            // [outputs, inputs, 3, 3]: 9 inputs apart from one output to the next
    int64_t input_step, tap_step;  // of grad_weight
    float* grad_bias;              // [outputs] or null
};

void winograd_conv2d_grad_weight(const WinogradGradWeight& call, int threads);

// The same in steps: one thread adds the images of a call to the sums of a chunk, of which the first call finds none,
// and at the end the sums of all chunks become the gradient of the filters. There is no gradient of a bias.
int64_t winograd_grad_sums(int64_t inputs, int64_t outputs);  // floats of a chunk, at a multiple of 64 bytes
int64_t winograd_grad_scratch(int64_t inputs, int64_t outputs);
int64_t winograd_grad_chunks(int64_t inputs, int64_t outputs, int64_t tiles);  // that pay, for so many tiles
void winograd_grad_add(const WinogradGradWeight& call, bool first, float* sums, float* scratch);
void winograd_grad_finish(const WinogradGradWeight& call, const float* sums, int64_t chunks, int threads);

// The gradient of the filters of one call by one thread, part by part of the channels, so that the sums stay in the
// cache; or, where grad_weight is null, the square of its norm. `memory` is so many floats, at a multiple of 64 bytes.
int64_t winograd_grad_alone_memory(int64_t inputs, int64_t outputs);
double winograd_grad_alone(const WinogradGradWeight& call, float* memory);

// U = G (scale g) G^T in double of filters g, as WinogradConv::weight.
struct WinogradPack {
    const float* weight;  // of the first output, input and tap of [outputs, inputs, 9]
    int64_t outputs, inputs;
    int64_t output_step, input_step, tap_step;  // of weight; a filter turned by 180 degrees has a negative tap_step
    const double* scale;                        // [outputs] or null for 1
    const double* transform;                    // G, [6, 3]
    float* packed;
};

void winograd_pack(const WinogradPack& call, int threads);

}  // namespace kr
