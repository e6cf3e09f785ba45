// One pass over the activations for each dependency of a BatchNorm on the whole batch: within a pass a group of images
// goes through all that does not wait for statistics while it is in the second cache.
#include "cpu/nn/block/residual_block.h"

#include <cstring>
#include <vector>

#include "cpu/nn/batch_norm_act.h"
#include "cpu/nn/block/block_conv.h"
#include "cpu/simd/aligned_floats.h"
#include "cpu/simd/parallel.h"

namespace kr {
namespace {

enum Layer { kFirst, kSecond, kShortcut };

// What the first and the last pass of a call have in common.
struct Block {
    explicit Block(const ResidualBlock& of)
        : call(of),
          first(of, kFirst),
          second(of, kSecond),
          shortcut(of, of.projection ? kShortcut : kFirst),
          pixels(first.output_pixels()),
          image(pixels * of.outputs),
          x_image(of.height * of.width * of.inputs),
          images(first.images_of_group(of.batch)),
          groups((of.batch + images - 1) / images),
          norm(images * pixels, of.batch * pixels, of.outputs),
          layers(of.projection ? 3 : 2) {}

    int64_t count(int64_t group) const { return group + 1 < groups ? images : call.batch - group * images; }
    int64_t at(int64_t group) const { return group * images * image; }      // of a group in y
    int64_t x_at(int64_t group) const { return group * images * x_image; }  // in x
    float* convolved(int layer) const { return call.convolved + layer * call.batch * image; }
    float* statistics(int layer) const { return call.statistics + 2 * layer * call.outputs; }
    uint8_t* positive(int64_t group) const { return call.positive + at(group) / 8; }
    const BlockConv& conv(int layer) const { return layer == kFirst ? first : layer == kSecond ? second : shortcut; }

    BatchNormAct norm_of(int layer, const float* x, int64_t rows) const {
        BatchNormAct made = {};
        made.x = x, made.rows = rows, made.channels = call.outputs, made.dtype = Dtype::f32;
        made.weight = call.norm_weight[layer], made.bias = call.norm_bias[layer], made.eps = call.eps[layer];
        made.mean = statistics(layer), made.var = made.mean + call.outputs;
        return made;
    }
    BatchNormActGradient gradient_of(int layer, const float* grad, const float* x, int64_t rows) const {
        BatchNormActGradient made = {};
        made.grad = grad, made.x = x, made.rows = rows, made.channels = call.outputs, made.dtype = Dtype::f32;
        made.weight = call.norm_weight[layer], made.bias = call.norm_bias[layer], made.eps = call.eps[layer];
        made.mean = statistics(layer), made.var = made.mean + call.outputs, made.relu = true;
        return made;
    }

    const ResidualBlock& call;
    const BlockConv first, second, shortcut;
    const int64_t pixels, image, x_image, images, groups;  // floats of an image of y and of x; images of a group
    const NormSteps norm;
    const int layers;
};

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// Packed filters of all layers that a pass over the network needs.
struct Packed {
    Packed(const Block& block, bool turned, int threads) : memory(0) {
        int64_t size = 0;
        for (int layer = 0; layer < block.layers; ++layer) size += whole_lines(block.conv(layer).packed_size(turned));
        memory = AlignedFloats(size);
        float* to = memory.floats;
        for (int layer = 0; layer < block.layers; ++layer) {
            of[layer] = to;
            block.conv(layer).pack(turned, to, threads);
            to += whole_lines(block.conv(layer).packed_size(turned));
        }
    }
    AlignedFloats memory;
    const float* of[3] = {};
};

void update_running(const ResidualBlock& call, int layer, const float* statistics, int64_t rows) {
    float *mean = call.running_mean[layer], *var = call.running_var[layer];
    if (mean == nullptr) return;
    const float momentum = call.momentum[layer], unbiased = momentum * ((float)rows / (float)(rows - 1));
    for (int64_t c = 0; c < call.outputs; ++c) {
        mean[c] += momentum * (statistics[c] - mean[c]);
        var[c] = (1.0f - momentum) * var[c] + unbiased * statistics[call.outputs + c];
    }
}

}  // namespace

void residual_block(const ResidualBlock& call, int threads) {
    const Block block(call);
    const Packed packed(block, false, threads);
    const int64_t scratch = larger(block.first.scratch(), larger(block.second.scratch(), block.shortcut.scratch()));
    const int64_t group_size = whole_lines(block.images * block.image);
    const AlignedFloats partials(block.layers * block.norm.partials()), factors(block.layers * block.norm.factors());
    const auto factors_of = [&](int layer) { return factors.floats + layer * block.norm.factors(); };
    const auto partials_of = [&](int layer) { return partials.floats + layer * block.norm.partials(); };
    // A convolution of one group, and the moments of what it gives.
    const auto convolve = [&](int layer, int64_t group, const float* x, float* memory) {
        float* y = block.convolved(layer) + block.at(group);
        block.conv(layer).forward(x, block.count(group), packed.of[layer], y, memory);
        block.norm.moments(block.norm_of(layer, y, block.count(group) * block.pixels), group, partials_of(layer));
    };
    const auto merge = [&](int layer) {
        const int64_t rows = call.batch * block.pixels;
        block.norm.merge_moments(block.norm_of(layer, nullptr, rows), partials_of(layer), factors_of(layer));
        update_running(call, layer, block.statistics(layer), rows);
    };

    parallel_for(block.groups, 1, threads, [&](int64_t begin, int64_t end) {
        const AlignedFloats memory(scratch);
        for (int64_t group = begin; group < end; ++group) {
            convolve(kFirst, group, call.x + block.x_at(group), memory.floats);
            if (call.projection) convolve(kShortcut, group, call.x + block.x_at(group), memory.floats);
        }
    });
    merge(kFirst);
    if (call.projection) merge(kShortcut);
    parallel_for(block.groups, 1, threads, [&](int64_t begin, int64_t end) {
        const AlignedFloats memory(scratch + group_size);
        float* t = memory.floats + scratch;
        for (int64_t group = end - 1; group >= begin; --group) {
            BatchNormAct norm =
                block.norm_of(kFirst, block.convolved(kFirst) + block.at(group), block.count(group) * block.pixels);
            norm.relu = true, norm.y = t;
            block.norm.apply(norm, factors_of(kFirst));
            convolve(kSecond, group, t, memory.floats);
        }
    });
    merge(kSecond);
    parallel_for(block.groups, 1, threads, [&](int64_t begin, int64_t end) {
        const AlignedFloats memory(call.projection ? group_size : 0);
        for (int64_t group = begin; group < end; ++group) {
            const int64_t rows = block.count(group) * block.pixels;
            const float* residual = call.x + block.x_at(group);
            if (call.projection) {
                BatchNormAct norm = block.norm_of(kShortcut, block.convolved(kShortcut) + block.at(group), rows);
                norm.y = memory.floats;
                block.norm.apply(norm, factors_of(kShortcut));
                residual = memory.floats;
            }
            BatchNormAct norm = block.norm_of(kSecond, block.convolved(kSecond) + block.at(group), rows);
            norm.residual = residual, norm.relu = true, norm.y = call.y + block.at(group);
            norm.positive = block.positive(group);
            std::memset(norm.positive, 0, (size_t)(rows * call.outputs / 8));
            block.norm.apply(norm, factors_of(kSecond));
        }
    });
}

void residual_block_inference(const ResidualBlock& call, int threads) {
    const Block block(call);
    const Packed packed(block, false, threads);
    const int64_t scratch = larger(block.first.scratch(), larger(block.second.scratch(), block.shortcut.scratch()));
    const int64_t group_size = whole_lines(block.images * block.image);
    const AlignedFloats factors(block.layers * block.norm.factors());
    for (int layer = 0; layer < block.layers; ++layer) {
        BatchNormActGradient given = block.gradient_of(layer, nullptr, nullptr, call.batch * block.pixels);
        given.mean = call.running_mean[layer], given.var = call.running_var[layer];
        block.norm.given_moments(given, factors.floats + layer * block.norm.factors());
    }
    parallel_for(block.groups, 1, threads, [&](int64_t begin, int64_t end) {
        const AlignedFloats memory(scratch + 3 * group_size);
        float *t = memory.floats + scratch, *u = t + group_size, *s = u + group_size;
        for (int64_t group = begin; group < end; ++group) {
            const auto layer = [&](int number, const float* x, float* convolved, const float* residual, bool relu,
                                   float* y) {
                block.conv(number).forward(x, block.count(group), packed.of[number], convolved, memory.floats);
                BatchNormAct norm = block.norm_of(number, convolved, block.count(group) * block.pixels);
                norm.residual = residual, norm.relu = relu, norm.y = y;
                block.norm.apply(norm, factors.floats + number * block.norm.factors());
            };
            const float* x = call.x + block.x_at(group);
            layer(kFirst, x, t, nullptr, true, t);
            if (call.projection) layer(kShortcut, x, s, nullptr, false, s);
            layer(kSecond, t, u, call.projection ? s : x, true, call.y + block.at(group));
        }
    });
}

void residual_block_backward(const ResidualBlock& call, const ResidualBlockGradient& gradient, int threads) {
    const Block block(call);
    const Packed packed(block, true, threads);
    const int64_t group_size = whole_lines(block.images * block.image), all = call.batch * block.pixels;
    const AlignedFloats partials(block.layers * block.norm.partials()), factors(block.layers * block.norm.factors());
    const auto factors_of = [&](int layer) { return factors.floats + layer * block.norm.factors(); };
    const auto partials_of = [&](int layer) { return partials.floats + layer * block.norm.partials(); };
    int64_t scratch = 0, sums_size[3] = {}, sums_at[3] = {}, all_sums = 0;
    for (int layer = 0; layer < block.layers; ++layer) {
        scratch = larger(scratch, block.conv(layer).backward_scratch());
        sums_size[layer] = whole_lines(block.conv(layer).sums());
    }
    const int64_t chunks = chunks_of_sums(block.groups, larger(sums_size[kFirst], sums_size[kSecond]),
                                          block.first.output_tiles() * call.batch);
    for (int layer = 0; layer < block.layers; ++layer) sums_at[layer] = all_sums, all_sums += chunks * sums_size[layer];
    const AlignedFloats sums(all_sums);
    // The gradient of the first layer's result lies where that of x will, if that is as large.
    const bool shares = gradient.grad_x != nullptr && block.x_image == block.image;
    const AlignedFloats between(shares ? 0 : call.batch * block.image);
    float* grad_t = shares ? gradient.grad_x : between.floats;

    const auto gradient_of = [&](int layer, int64_t group, const float* grad) {
        return block.gradient_of(layer, grad, block.convolved(layer) + block.at(group),
                                 block.count(group) * block.pixels);
    };
    // The same for what stands before the last ReLU.
    const auto last_gradient_of = [&](int layer, int64_t group) {
        BatchNormActGradient made = gradient_of(layer, group, gradient.grad + block.at(group));
        made.positive = block.positive(group);
        return made;
    };
    const auto merge = [&](int layer) {
        BatchNormActGradient made = block.gradient_of(layer, nullptr, nullptr, all);
        made.grad_weight = gradient.grad_norm + 2 * layer * call.outputs;
        made.grad_bias = made.grad_weight + call.outputs;
        block.norm.merge_sums(made, partials_of(layer), factors_of(layer));
    };
    // Calls each(group, whether it is the first of its chunk, chunk, memory) for all groups.
    const auto each_group = [&](int64_t floats, const auto& each) {
        parallel_for(chunks, 1, threads, [&](int64_t begin, int64_t end) {
            const AlignedFloats memory(scratch + floats);
            for (int64_t chunk = begin; chunk < end; ++chunk) {
                const int64_t from = block.groups * chunk / chunks, to = block.groups * (chunk + 1) / chunks;
                for (int64_t group = from; group < to; ++group) each(group, group == from, chunk, memory.floats);
            }
        });
    };
    const auto add_grad_weight = [&](int layer, int64_t group, const float* x, const float* grad, bool first,
                                     int64_t chunk, float* memory) {
        block.conv(layer).grad_weight(x, grad, block.count(group), first,
                                      sums.floats + sums_at[layer] + chunk * sums_size[layer], memory);
    };

    for (int layer = 0; layer < block.layers; ++layer)
        block.norm.given_moments(block.gradient_of(layer, nullptr, nullptr, all), factors_of(layer));
    parallel_for(block.groups, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t group = end - 1; group >= begin; --group)
            for (int layer = kSecond; layer < block.layers; ++layer)
                block.norm.sums(last_gradient_of(layer, group), group, factors_of(layer), partials_of(layer));
    });
    for (int layer = kSecond; layer < block.layers; ++layer) merge(layer);
    each_group(2 * group_size, [&](int64_t group, bool first, int64_t chunk, float* memory) {
        float *t = memory + scratch, *grad = t + group_size;
        BatchNormAct norm =
            block.norm_of(kFirst, block.convolved(kFirst) + block.at(group), block.count(group) * block.pixels);
        norm.relu = true, norm.y = t;
        block.norm.apply(norm, factors_of(kFirst));
        BatchNormActGradient last = last_gradient_of(kSecond, group);
        last.out = grad;
        block.norm.input_gradient(last, factors_of(kSecond));
        float* to = grad_t + block.at(group);
        block.second.grad_input(grad, block.count(group), packed.of[kSecond], to, false, nullptr, nullptr, memory);
        block.norm.sums(gradient_of(kFirst, group, to), group, factors_of(kFirst), partials_of(kFirst));
        add_grad_weight(kSecond, group, t, grad, first, chunk, memory);
    });
    merge(kFirst);
    each_group(group_size, [&](int64_t group, bool first, int64_t chunk, float* memory) {
        const float* x = call.x + block.x_at(group);
        float *grad = memory + scratch, *to = gradient.grad_x ? gradient.grad_x + block.x_at(group) : nullptr;
        BatchNormActGradient norm = gradient_of(kFirst, group, grad_t + block.at(group));
        norm.out = grad;
        block.norm.input_gradient(norm, factors_of(kFirst));
        const float* passed = call.projection ? nullptr : gradient.grad + block.at(group);
        if (to)
            block.first.grad_input(grad, block.count(group), packed.of[kFirst], to, false, passed,
                                   passed ? block.positive(group) : nullptr, memory);
        add_grad_weight(kFirst, group, x, grad, first, chunk, memory);
        if (!call.projection) return;
        norm = last_gradient_of(kShortcut, group);
        norm.out = grad;
        block.norm.input_gradient(norm, factors_of(kShortcut));
        if (to)
            block.shortcut.grad_input(grad, block.count(group), packed.of[kShortcut], to, true, nullptr, nullptr,
                                      memory);
        add_grad_weight(kShortcut, group, x, grad, first, chunk, memory);
    });
    for (int layer = 0; layer < block.layers; ++layer)
        block.conv(layer).finish(sums.floats + sums_at[layer], chunks, sums_size[layer], gradient.grad_weight[layer],
                                 threads);
}

}  // namespace kr
