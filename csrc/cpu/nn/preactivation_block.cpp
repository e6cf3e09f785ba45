// A group of images goes through the whole block, forward or backward, while it is in the second-level cache: nothing
// in it waits for other images but the sums of the gradients of the parameters.
#include "cpu/nn/block/preactivation_block.h"

#include <cstring>

#include "cpu/nn/direct_conv2d.h"
#include "cpu/nn/group_norm_silu.h"
#include "cpu/nn/winograd_conv2d.h"
#include "cpu/simd/aligned_floats.h"
#include "cpu/simd/parallel.h"

namespace kr {
namespace {

constexpr int64_t kGroupFloats = 48 * 1024;  // of a group's largest array: some of them and the tiles fill L2
// Chunks of groups whose sums are made apart, by the shape alone, so that bits do not depend on threads.
constexpr int64_t kMostChunks = 16, kFewestTiles = 128, kMostSums = 1280 * 1024;

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t share(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
int64_t whole_lines(int64_t floats) { return share(floats, 16) * 16; }

struct Block {
    explicit Block(const PreactivationBlock& of)
        : call(of),
          pixels(of.height * of.width),
          inputs(of.x_channels + of.skip_channels),
          outputs(of.outputs),
          tiles(share(of.height, 4) * share(of.width, 4)),
          images(images_of_group()),
          groups(share(of.batch, images)),
          in_size(whole_lines(images * pixels * inputs)),
          out_size(whole_lines(images * pixels * outputs)) {
        shortcut.height = shortcut.output_height = of.height, shortcut.width = shortcut.output_width = of.width;
        shortcut.inputs = inputs, shortcut.outputs = outputs;
        shortcut.kernel_height = shortcut.kernel_width = shortcut.stride_y = shortcut.stride_x = 1;
        shortcut.pad_y = shortcut.pad_x = 0;
    }
    // Of the sizes that fit the cache, that which leaves the least of the products' rows empty, and the smallest part
    // of them to the slower of two threads.
    int64_t images_of_group() const {
        const int64_t rows = outputs <= 16 ? 21 : 14, most = kGroupFloats / (pixels * larger(inputs, outputs));
        int64_t best = 1, least = 0;
        for (int64_t n = 1; n <= smaller(call.batch, larger(most, 1)); ++n) {
            const int64_t cost = share(share(call.batch, n), 2) * share(n * tiles, rows);
            if (n == 1 || cost <= least) best = n, least = cost;
        }
        return best;
    }
    int64_t chunks() const {
        const int64_t floats = winograd_grad_sums(inputs, outputs) + winograd_grad_sums(outputs, outputs);
        int64_t n = groups > 1 ? 2 : 1;
        while (2 * n <= smaller(kMostChunks, groups) && 2 * n * floats <= kMostSums &&
               call.batch * tiles >= 2 * n * kFewestTiles)
            n *= 2;
        return n;
    }
    int64_t count(int64_t group) const { return smaller(images, call.batch - group * images); }
    int64_t first(int64_t group) const { return group * images; }
    int64_t channels(int layer) const { return layer == 1 ? outputs : inputs; }
    float* mean(int norm) const { return call.statistics + (norm ? 2 * call.batch * call.groups[0] : 0); }
    float* rstd(int norm) const { return mean(norm) + call.batch * call.groups[norm]; }

    // Of a norm of one group, without y.
    GroupNorm norm_of(int norm, int64_t group) const {
        GroupNorm made = {};
        const int64_t at = first(group);
        made.batch = count(group), made.pixels = pixels, made.dtype = made.affine_dtype = made.shift_dtype = Dtype::f32;
        made.weight = call.norm_weight[norm], made.bias = call.norm_bias[norm];
        made.groups = call.groups[norm], made.eps = call.eps[norm], made.silu = true;
        if (norm == 0) {
            made.x = call.x + at * pixels * call.x_channels, made.x_channels = call.x_channels;
            made.skip = call.skip ? call.skip + at * pixels * call.skip_channels : nullptr;
            made.skip_channels = call.skip_channels;
        } else {
            made.x = call.convolved + at * pixels * outputs, made.x_channels = outputs;
            if (call.shift) made.shift = call.shift + at * call.shift_stride, made.shift_stride = call.shift_stride;
        }
        return made;
    }
    float* mean_of(int norm, int64_t group) const { return mean(norm) + first(group) * call.groups[norm]; }
    float* rstd_of(int norm, int64_t group) const { return rstd(norm) + first(group) * call.groups[norm]; }

    // [x, skip] of a group, joined in `memory` where there are two.
    const float* joined(int64_t group, float* memory) const {
        const int64_t at = first(group) * pixels, rows = count(group) * pixels, c = call.x_channels;
        const float* x = call.x + at * c;
        if (call.skip == nullptr) return x;
        const float* skip = call.skip + at * call.skip_channels;
        for (int64_t r = 0; r < rows; ++r) {
            std::memcpy(memory + r * inputs, x + r * c, sizeof(float) * (size_t)c);
            std::memcpy(memory + r * inputs + c, skip + r * call.skip_channels,
                        sizeof(float) * (size_t)call.skip_channels);
        }
        return memory;
    }

    WinogradConv conv(int layer, bool turned, const float* x, int64_t group, const float* packed, float* y) const {
        WinogradConv made = {};
        made.x = x, made.batch = count(group), made.height = call.height, made.width = call.width, made.y = y;
        made.inputs = turned ? outputs : channels(layer), made.outputs = turned ? channels(layer) : outputs;
        made.weight = packed;
        if (!turned) made.bias = call.bias[layer];
        return made;
    }
    WinogradGradWeight grad_of(int layer) const {
        WinogradGradWeight made = {};
        made.height = call.height, made.width = call.width, made.inputs = channels(layer), made.outputs = outputs;
        return made;
    }
    DirectConvSteps shortcut_steps() const { return {inputs, call.input_step[2], call.tap_step[2]}; }

    const PreactivationBlock& call;
    const int64_t pixels, inputs, outputs, tiles, images, groups;
    const int64_t in_size, out_size;  // floats of a group of u and of y
    DirectConvShape shortcut;
};

// Filters of all layers, packed for a pass over the block.
struct Packed {
    Packed(const Block& block, bool turned, int threads)
        : memory(whole_lines(winograd_size(block, 0, turned)) + whole_lines(winograd_size(block, 1, turned)) +
                 (block.call.projection ? direct_conv2d_packed_size(block.shortcut, turned) : 0)) {
        float* to = memory.floats;
        for (int layer = 0; layer < 2; ++layer) {
            WinogradPack pack = {};
            const int64_t inputs = block.channels(layer), output_step = 9 * inputs;
            const int64_t input_step = block.call.input_step[layer], tap_step = block.call.tap_step[layer];
            pack.weight = block.call.weight[layer] + (turned ? 8 * tap_step : 0);
            pack.outputs = turned ? inputs : block.outputs, pack.inputs = turned ? block.outputs : inputs;
            pack.output_step = turned ? input_step : output_step, pack.input_step = turned ? output_step : input_step;
            pack.tap_step = turned ? -tap_step : tap_step;
            pack.transform = block.call.transform, pack.packed = to;
            winograd_pack(pack, threads);
            of[layer] = to;
            to += whole_lines(winograd_size(block, layer, turned));
        }
        of[2] = to;
        if (block.call.projection)
            direct_conv2d_pack(block.shortcut, block.call.weight[2], block.shortcut_steps(), turned, to);
    }
    static int64_t winograd_size(const Block& block, int layer, bool turned) {
        const int64_t outputs = turned ? block.channels(layer) : block.outputs;
        const int64_t inputs = turned ? block.outputs : block.channels(layer), size = winograd_block(outputs);
        return 36 * share(outputs, size) * size * share(inputs, 16) * 16;
    }
    AlignedFloats memory;
    const float* of[3];
};

// sums[c] += sum over rows of from[row, c], or = it.
void sum_columns(const float* from, int64_t rows, int64_t columns, bool first, float* sums) {
    if (first) std::memset(sums, 0, sizeof(float) * (size_t)columns);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) sums[c] += from[r * columns + c];
}

// to[row, c] += from[row, c] of `columns` columns of `from`, whose rows lie `step` apart.
void add_columns(const float* from, int64_t step, int64_t rows, int64_t columns, float* to) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) to[r * columns + c] += from[r * step + c];
}

}  // namespace

void preactivation_block(const PreactivationBlock& call, int threads) {
    const Block block(call);
    const Packed packed(block, false, threads);
    const int64_t scratch = whole_lines(
        larger(winograd_scratch(block.inputs, block.outputs), winograd_scratch(block.outputs, block.outputs)));
    parallel_for(block.groups, 1, threads, [&](int64_t begin, int64_t end) {
        const AlignedFloats memory(scratch + (call.skip ? block.in_size : 0));
        for (int64_t group = begin; group < end; ++group) {
            const int64_t at = block.first(group) * block.pixels;
            float *first = call.first + at * block.inputs, *second = call.second + at * block.outputs;
            float *convolved = call.convolved + at * block.outputs, *y = call.y + at * block.outputs;
            GroupNorm norm = block.norm_of(0, group);
            norm.y = first;
            group_norm_silu(norm, {block.mean_of(0, group), block.rstd_of(0, group)}, 1);
            winograd_conv2d_within(block.conv(0, false, first, group, packed.of[0], convolved), memory.floats);
            norm = block.norm_of(1, group);
            norm.y = second;
            group_norm_silu(norm, {block.mean_of(1, group), block.rstd_of(1, group)}, 1);
            const float* residual = block.joined(group, memory.floats + scratch);
            if (call.projection) {
                direct_conv2d_images(block.shortcut, residual, packed.of[2], call.bias[2], y, 0, block.count(group));
                residual = y;
            }
            WinogradConv conv = block.conv(1, false, second, group, packed.of[1], y);
            conv.residual = residual;
            winograd_conv2d_within(conv, memory.floats);
        }
    });
}

void preactivation_block_backward(const PreactivationBlock& call, const PreactivationBlockGradient& out, int threads) {
    const Block block(call);
    const Packed packed(block, true, threads);
    const int64_t inputs = block.inputs, outputs = block.outputs, chunks = block.chunks();
    int64_t scratch = call.projection ? direct_conv2d_scratch(block.shortcut) : 0;
    // Floats of the sums of a chunk: of the filters of each layer, and of the columns of grad.
    int64_t sizes[4] = {0, 0, call.projection ? whole_lines(direct_conv2d_sums(block.shortcut)) : 0,
                        whole_lines(outputs)};
    for (int layer = 0; layer < 2; ++layer) {
        const int64_t c = block.channels(layer);
        scratch = larger(scratch, larger(winograd_scratch(outputs, c), winograd_grad_scratch(c, outputs)));
        sizes[layer] = winograd_grad_sums(c, outputs);
    }
    scratch = whole_lines(scratch);
    const AlignedFloats memory_of_sums(chunks * (sizes[0] + sizes[1] + sizes[2] + sizes[3]));
    float* sums[4] = {memory_of_sums.floats};
    for (int i = 0; i < 3; ++i) sums[i + 1] = sums[i] + chunks * sizes[i];
    const int64_t affine = 2 * (inputs + outputs);  // floats that a group adds to the gradients of the norms
    const AlignedFloats affines(block.groups * affine);

    parallel_for(chunks, 1, threads, [&](int64_t begin, int64_t end) {
        const AlignedFloats memory(scratch + 2 * block.out_size + 2 * block.in_size);
        float *grad_second = memory.floats + scratch, *grad_convolved = grad_second + block.out_size;
        float *grad_first = grad_convolved + block.out_size, *u = grad_first + block.in_size;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            const auto sum = [&](int i) { return sums[i] + chunk * sizes[i]; };
            const int64_t from = block.groups * chunk / chunks, to = block.groups * (chunk + 1) / chunks;
            for (int64_t group = from; group < to; ++group) {
                const bool first = group == from;
                const int64_t image = block.first(group), at = image * block.pixels, count = block.count(group);
                const int64_t rows = count * block.pixels;
                const float* grad = out.grad + at * outputs;
                float* norm_sums = affines.floats + group * affine;
                const auto add_filters = [&](int layer, const float* x, const float* upstream) {
                    WinogradGradWeight made = block.grad_of(layer);
                    made.batch = count, made.x = x, made.grad_output = upstream;
                    winograd_grad_add(made, first, sum(layer), memory.floats);
                };

                winograd_conv2d_within(block.conv(1, true, grad, group, packed.of[1], grad_second), memory.floats);
                add_filters(1, call.second + at * outputs, grad);
                GroupNormGradient norm = {};
                norm.grad = grad_second, norm.mean = block.mean_of(1, group), norm.rstd = block.rstd_of(1, group);
                norm.out = grad_convolved, norm.grad_shift = out.grad_shift + image * outputs;
                norm.grad_weight = norm_sums, norm.grad_bias = norm_sums + outputs;
                group_norm_silu_backward(block.norm_of(1, group), norm, 1);

                winograd_conv2d_within(block.conv(0, true, grad_convolved, group, packed.of[0], grad_first),
                                       memory.floats);
                add_filters(0, call.first + at * inputs, grad_convolved);
                norm = {};
                norm.grad = grad_first, norm.mean = block.mean_of(0, group), norm.rstd = block.rstd_of(0, group);
                norm.out = out.grad_x + at * call.x_channels;
                norm.skip_out = call.skip ? out.grad_skip + at * call.skip_channels : nullptr;
                norm.grad_weight = norm_sums + 2 * outputs, norm.grad_bias = norm.grad_weight + inputs;
                group_norm_silu_backward(block.norm_of(0, group), norm, 1);

                const float* by_shortcut = grad;
                if (call.projection) {
                    direct_conv2d_grad_input_images(block.shortcut, grad, packed.of[2], grad_first, false, 0, count);
                    by_shortcut = grad_first;
                    direct_conv2d_grad_weight_images(block.shortcut, block.joined(group, u), grad, false, 0, count,
                                                     sum(2), first, memory.floats);
                }
                add_columns(by_shortcut, inputs, rows, call.x_channels, out.grad_x + at * call.x_channels);
                if (call.skip)
                    add_columns(by_shortcut + call.x_channels, inputs, rows, call.skip_channels,
                                out.grad_skip + at * call.skip_channels);
                sum_columns(grad, rows, outputs, first, sum(3));
            }
        }
    });

    for (int layer = 0; layer < 2; ++layer) {
        WinogradGradWeight made = block.grad_of(layer);
        made.grad_weight = out.grad_weight[layer];
        made.input_step = call.input_step[layer], made.tap_step = call.tap_step[layer];
        winograd_grad_finish(made, sums[layer], chunks, threads);
    }
    if (call.projection)
        direct_conv2d_grad_weight_finish(block.shortcut, sums[2], chunks, sizes[2], out.grad_weight[2],
                                         block.shortcut_steps(), nullptr);
    const auto add_up = [](const float* from, int64_t rows, int64_t row_step, int64_t columns, float* to) {
        for (int64_t c = 0; c < columns; ++c) {
            double total = 0.0;
            for (int64_t r = 0; r < rows; ++r) total += (double)from[r * row_step + c];
            to[c] = (float)total;
        }
    };
    // The first convolution's bias and the shift are added to the same numbers; so are the second's and the shortcut's.
    add_up(out.grad_shift, call.batch, outputs, outputs, out.grad_bias[0]);
    add_up(sums[3], chunks, sizes[3], outputs, out.grad_bias[1]);
    if (call.projection) std::memcpy(out.grad_bias[2], out.grad_bias[1], sizeof(float) * (size_t)outputs);
    add_up(affines.floats, block.groups, affine, outputs, out.grad_norm_weight[1]);
    add_up(affines.floats + outputs, block.groups, affine, outputs, out.grad_norm_bias[1]);
    add_up(affines.floats + 2 * outputs, block.groups, affine, inputs, out.grad_norm_weight[0]);
    add_up(affines.floats + 2 * outputs + inputs, block.groups, affine, inputs, out.grad_norm_bias[0]);
}

}  // namespace kr
