#include "cpu/nn/block/block_conv.h"

#include "cpu/nn/batch_norm_act.h"
#include "cpu/nn/winograd_conv2d.h"

namespace kr {
namespace {

constexpr int64_t kGroupFloats = 48 * 1024;  // of an image group's largest array: three of them and tiles fill L2
// Where the sums of filters leave L2 a group has so many tiles that reading and writing the sums costs little.
constexpr int64_t kWideChannels = 64, kWideTiles = 256;
constexpr int64_t kMostChunks = 16, kFewestTiles = 128, kMostSums = 640 * 1024;  // as winograd_conv2d_grad_weight

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t share(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

}  // namespace

int64_t chunks_of_sums(int64_t groups, int64_t floats, int64_t tiles) {
    int64_t chunks = groups > 1 ? 2 : 1;
    while (2 * chunks <= smaller(kMostChunks, groups) && 2 * chunks * floats <= kMostSums &&
           tiles >= 2 * chunks * kFewestTiles)
        chunks *= 2;
    return chunks;
}

BlockConv::BlockConv(const ResidualBlock& block, int layer)
    : winograd_(block.winograd[layer]), weight_(block.weight[layer]), transform_(block.transform) {
    const bool second = layer == 1;
    const int64_t stride = second ? 1 : block.stride, side = layer == 2 ? 1 : 3, pad = side / 2;
    const int64_t down = (block.height - 1) / block.stride + 1, across = (block.width - 1) / block.stride + 1;
    shape_.height = second ? down : block.height, shape_.width = second ? across : block.width;
    shape_.inputs = second ? block.outputs : block.inputs, shape_.outputs = block.outputs;
    shape_.output_height = down, shape_.output_width = across;
    shape_.kernel_height = shape_.kernel_width = side, shape_.stride_y = shape_.stride_x = stride;
    shape_.pad_y = shape_.pad_x = pad;
    steps_ = {side * side * shape_.inputs, block.input_step[layer], block.tap_step[layer]};
}

int64_t BlockConv::output_tiles() const { return share(shape_.output_height, 4) * share(shape_.output_width, 4); }

// By the shape alone. Of the sizes that fit the cache, that which leaves the least of the products' rows empty, and the
// smallest part of them to the slower of two threads.
int64_t BlockConv::images_of_group(int64_t batch) const {
    const int64_t tiles = output_tiles(), rows = shape_.outputs <= 16 ? 21 : 14;
    const int64_t image = larger(shape_.height * shape_.width * shape_.inputs, output_pixels() * shape_.outputs);
    if (larger(shape_.inputs, shape_.outputs) > kWideChannels)
        return smaller(share(batch, 2), share(kWideTiles, tiles));
    int64_t best = 1, least = 0;
    for (int64_t images = 1; images <= smaller(batch, larger(kGroupFloats / image, 1)); ++images) {
        const int64_t cost = share(share(batch, images), 2) * share(images * tiles, rows);
        if (images == 1 || cost <= least) best = images, least = cost;
    }
    return best;
}

// Waking a thread costs as much as the filters of 64 by 64 channels.
int BlockConv::workers(int threads) const { return shape_.inputs * shape_.outputs > 64 * 64 ? threads : 1; }

int64_t BlockConv::packed_size(bool turned) const {
    if (!winograd_) return direct_conv2d_packed_size(shape_, turned);
    const int64_t outputs = turned ? shape_.inputs : shape_.outputs, inputs = turned ? shape_.outputs : shape_.inputs;
    const int64_t block = winograd_block(outputs);
    return 36 * share(outputs, block) * block * share(inputs, 16) * 16;
}

void BlockConv::pack(bool turned, float* packed, int threads) const {
    if (!winograd_) return direct_conv2d_pack(shape_, weight_, steps_, turned, packed);
    WinogradPack call = {};
    call.weight = weight_, call.outputs = shape_.outputs, call.inputs = shape_.inputs;
    call.output_step = steps_.output, call.input_step = steps_.input, call.tap_step = steps_.tap;
    if (turned) {  // from the last tap back to the first
        call.weight += 8 * steps_.tap, call.tap_step = -steps_.tap;
        call.outputs = shape_.inputs, call.inputs = shape_.outputs;
        call.output_step = steps_.input, call.input_step = steps_.output;
    }
    call.transform = transform_, call.packed = packed;
    winograd_pack(call, workers(threads));
}

int64_t BlockConv::scratch() const { return winograd_ ? winograd_scratch(shape_.inputs, shape_.outputs) : 0; }

int64_t BlockConv::backward_scratch() const {
    if (!winograd_) return share(direct_conv2d_scratch(shape_), 16) * 16;
    const int64_t floats =
        larger(winograd_scratch(shape_.outputs, shape_.inputs), winograd_grad_scratch(shape_.inputs, shape_.outputs));
    return share(floats, 16) * 16;
}

void BlockConv::forward(const float* x, int64_t images, const float* packed, float* y, float* scratch) const {
    if (!winograd_) return direct_conv2d_images(shape_, x, packed, nullptr, y, 0, images);
    WinogradConv call = {};
    call.x = x, call.batch = images, call.height = shape_.height, call.width = shape_.width;
    call.inputs = shape_.inputs, call.outputs = shape_.outputs, call.weight = packed, call.y = y;
    winograd_conv2d_within(call, scratch);
}

void BlockConv::grad_input(const float* grad, int64_t images, const float* packed, float* grad_x, bool adds,
                           const float* more, const uint8_t* bits, float* scratch) const {
    if (!winograd_) {
        if (more) masked_gradient(more, bits, images * shape_.height * shape_.width * shape_.inputs, grad_x);
        return direct_conv2d_grad_input_images(shape_, grad, packed, grad_x, adds || more, 0, images);
    }
    WinogradConv call = {};
    call.x = grad, call.batch = images, call.height = shape_.height, call.width = shape_.width;
    call.inputs = shape_.outputs, call.outputs = shape_.inputs, call.weight = packed, call.y = grad_x;
    call.residual = more ? more : adds ? grad_x : nullptr, call.residual_bits = bits;
    winograd_conv2d_within(call, scratch);
}

int64_t BlockConv::sums() const {
    return winograd_ ? winograd_grad_sums(shape_.inputs, shape_.outputs) : direct_conv2d_sums(shape_);
}

static WinogradGradWeight winograd_grad(const DirectConvShape& shape) {
    WinogradGradWeight call = {};
    call.height = shape.height, call.width = shape.width, call.inputs = shape.inputs, call.outputs = shape.outputs;
    return call;
}

void BlockConv::grad_weight(const float* x, const float* grad, int64_t images, bool first, float* sums,
                            float* scratch) const {
    if (!winograd_) return direct_conv2d_grad_weight_images(shape_, x, grad, false, 0, images, sums, first, scratch);
    WinogradGradWeight call = winograd_grad(shape_);
    call.x = x, call.grad_output = grad, call.batch = images;
    winograd_grad_add(call, first, sums, scratch);
}

void BlockConv::finish(const float* sums, int64_t chunks, int64_t step, float* grad_weight, int threads) const {
    if (!winograd_) return direct_conv2d_grad_weight_finish(shape_, sums, chunks, step, grad_weight, steps_, nullptr);
    WinogradGradWeight call = winograd_grad(shape_);
    call.grad_weight = grad_weight, call.input_step = steps_.input, call.tap_step = steps_.tap;
    winograd_grad_finish(call, sums, chunks, workers(threads));
}

}  // namespace kr
