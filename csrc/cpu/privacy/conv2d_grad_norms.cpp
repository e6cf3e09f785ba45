#include "cpu/privacy/conv2d_grad_norms.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/nn/direct_conv2d.h"
#include "cpu/nn/winograd_conv2d.h"
#include "cpu/simd/aligned_floats.h"
#include "cpu/simd/parallel.h"

namespace kr {
namespace {

// Outputs [first, last) of each axis that a tap moves inside of x, and where to: output (i, j) reads pixel (i + down,
// j + across) of `height` by `width`.
struct GramTap {
    int64_t images, output_height, output_width, height, width;
    int64_t first_row, last_row, first_column, last_column, down, across;
};

// A band of lines of dy of a record, and a block of channels.
struct Windows {
    const float *x, *grad;    // of the record, and of the band, from the block's first channel
    const int64_t* lines;     // where each kernel row of a line of dy reads x, or -1 outside of it
    int64_t count;            // lines of the band
    const float* zeros;       // a line of x of them
    int64_t inputs, outputs;  // of the block
    float* sums;              // [inputs][taps][step]
    int64_t step;
    // What is read after this block is asked for from memory, so many floats with each 8 outputs.
    const float *next_x, *next_grad;
    int64_t next_x_share, next_grad_share;
};

}  // namespace
}  // namespace kr

#define KR_KERNEL "cpu/privacy/conv2d_grad_norms_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {
namespace {

constexpr int64_t kGathered = 32;         // outputs of a group, from which on it is worth while to copy it
constexpr int64_t kBandFloats = 1 << 14;  // of x and dy together, for the second cache
constexpr int64_t kBandPixels = 64;       // at least: so many products pay for adding their sum

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A tap along one axis: it reads pixels residue, residue + stride, ... of x, `pixels` of them, of which output i reads
// number i + shift; outputs [first, last) read inside of x.
struct Axis {
    Axis(int64_t tap, int64_t stride, int64_t pad, int64_t dilation, int64_t size, int64_t outputs) {
        const int64_t offset = tap * dilation - pad;
        residue = (offset % stride + stride) % stride;
        shift = (offset - residue) / stride;
        pixels = residue < size ? (size - residue - 1) / stride + 1 : 0;
        first = std::max<int64_t>(0, -shift);
        last = std::max(first, std::min(outputs, pixels - shift));
    }
    int64_t residue, shift, pixels, first, last;
};
Axis down_of(const ConvGradients& s, int64_t tap) {
    return {tap, s.stride_y, s.pad_y, s.dilation_y, s.height, s.output_height};
}
Axis across_of(const ConvGradients& s, int64_t tap) {
    return {tap, s.stride_x, s.pad_x, s.dilation_x, s.width, s.output_width};
}

// Calls body(down, across) once for every two residues, of which taps read the same pixels.
template <class Body>
void for_each_residue(const ConvGradients& s, const Body& body) {
    const auto is_first = [](int64_t tap, int64_t stride, int64_t dilation) {
        for (int64_t before = 0; before < tap; ++before)
            if ((tap - before) * dilation % stride == 0) return false;
        return true;
    };
    for (int64_t k = 0; k < s.kernel_height; ++k)
        for (int64_t l = 0; l < s.kernel_width && is_first(k, s.stride_y, s.dilation_y); ++l)
            if (is_first(l, s.stride_x, s.dilation_x)) body(down_of(s, k), across_of(s, l));
}

int64_t outputs_of(const ConvGradients& s) { return s.images * s.output_height * s.output_width; }

// How a record's gradient is summed, or the square of its norm without it.
enum class Form { gram, winograd, direct, windows, gathered };

// What the convolution of a whole record is to direct_conv2d, or, gathered, what one of its taps in one group is: a 1x1
// convolution of moved x, with channels rounded up so that x is read where it lies.
DirectConvShape shape_of(const ConvGradients& s, bool gathered) {
    DirectConvShape shape = {s.height,        s.width,        s.inputs,   s.output_height, s.output_width, s.outputs,
                             s.kernel_height, s.kernel_width, s.stride_y, s.stride_x,      s.pad_y,        s.pad_x};
    if (!gathered) return shape;
    shape.inputs = round_up(s.inputs / s.groups, 4), shape.outputs = round_up(s.outputs / s.groups, 4);
    shape.kernel_height = shape.kernel_width = 1, shape.pad_y = shape.pad_x = 0;
    return shape;
}

WinogradGradWeight winograd_of(const ConvGradients& s, int64_t record) {
    return {s.x + record * s.images * s.height * s.width * s.inputs,
            s.grad_output + record * outputs_of(s) * s.outputs,
            s.images,
            s.height,
            s.width,
            s.inputs,
            s.outputs,
            s.weight ? s.weight + record * s.outputs * s.inputs * 9 : nullptr,
            9,
            1,
            nullptr};
}

// The form of fewest multiplications. Those in double count twice, and work of another kind as the multiplications that
// took as long where it was measured (AVX2, the layers of ResNet-14 and of a UNet).
Form form_of(const ConvGradients& s) {
    const bool symmetric = (s.height + 2 * s.pad_y - s.kernel_height) / s.stride_y + 1 == s.output_height &&
                           (s.width + 2 * s.pad_x - s.kernel_width) / s.stride_x + 1 == s.output_width;
    const bool plain = s.groups == 1 && s.dilation_y == 1 && s.dilation_x == 1 && symmetric;
    const double outputs = (double)outputs_of(s), taps = (double)(s.kernel_height * s.kernel_width);
    const double filters = (double)(round_up(s.inputs, 4) * round_up(s.outputs, 8)), direct = outputs * taps * filters;
    if (!s.weight && s.groups == 1) {
        const auto matrix = [](double n, double channels) { return n * (n + 16) * channels + 4 * n * channels; };
        double gram = matrix(outputs, (double)s.outputs) + 2 * taps * outputs * (outputs + 8);
        for_each_residue(s, [&](const Axis& down, const Axis& across) {
            gram += matrix((double)(s.images * down.pixels * across.pixels), (double)s.inputs);
        });
        if (2 * gram < direct && outputs <= 512) return Form::gram;
    }
    const bool small = s.kernel_height == 3 && s.kernel_width == 3 && s.stride_y == 1 && s.stride_x == 1 &&
                       s.pad_y == 1 && s.pad_x == 1 && s.inputs >= 8 && s.outputs >= 8;
    if (plain && small) {
        const double tiles = (double)(s.images * ((s.height + 3) / 4) * ((s.width + 3) / 4));
        const double padded = (double)(round_up(s.inputs, 16) * round_up(s.outputs, 16));
        if (tiles * (40 * padded + 400.0 * (double)(s.inputs + s.outputs)) + 800 * padded < direct)
            return Form::winograd;
    }
    if (s.groups > 1 && s.outputs / s.groups < kGathered) return Form::windows;
    return plain ? Form::direct : Form::gathered;
}

// The bias's part, and the norm of both: `square` is the weight's, or was not taken of a gradient that is kept, which
// is still in the cache.
void finish(const ConvGradients& s, int64_t record, double square, float* sums) {
    const int64_t weights = s.outputs * (s.inputs / s.groups) * s.kernel_height * s.kernel_width;
    if (s.weight) square = s.norms ? KR_DISPATCH(squares, s.weight + record * weights, weights) : 0.0;
    if (s.with_bias) {
        const int64_t rows = outputs_of(s);
        float* to = s.weight ? s.bias + record * s.outputs : sums;
        KR_DISPATCH(sum_outputs, s.grad_output + record * rows * s.outputs, rows, s.outputs, to);
        if (s.norms) square += KR_DISPATCH(squares, to, s.outputs);
    }
    if (s.norms) s.norms[record] = (float)std::sqrt(square);
}

// Doubles from one channel or row to the next: an odd number of cache lines, so that they share no set.
int64_t gram_step(int64_t n) { return round_up(n, 16) + 8; }

void gram_records(const ConvGradients& s, int64_t begin, int64_t end) {
    const int64_t outputs = outputs_of(s), output_step = gram_step(outputs), image = s.height * s.width * s.inputs;
    int64_t most = 0;
    for_each_residue(s, [&](const Axis& down, const Axis& across) {
        most = std::max(most, s.images * down.pixels * across.pixels);
    });
    const int64_t most_step = gram_step(most), wide = std::max(most_step * s.inputs, output_step * s.outputs);
    const AlignedFloats memory(2 * (output_step * output_step + most_step * most_step + wide) +
                               2 * std::max(most, outputs) + round_up(s.outputs, 16));
    double* of_outputs = reinterpret_cast<double*>(memory.floats);
    double *of_pixels = of_outputs + output_step * output_step, *columns = of_pixels + most_step * most_step;
    int64_t* at = reinterpret_cast<int64_t*>(columns + wide);
    float* bias = reinterpret_cast<float*>(at + std::max(most, outputs));
    for (int64_t record = begin; record < end; ++record) {
        const float *x = s.x + record * s.images * image, *grad = s.grad_output + record * outputs * s.outputs;
        for (int64_t t = 0; t < outputs; ++t) at[t] = t * s.outputs;
        KR_DISPATCH(gram_columns, grad, at, outputs, s.outputs, columns, output_step);
        KR_DISPATCH(gram_matrix, columns, outputs, s.outputs, output_step, of_outputs);
        double square = 0.0;
        for_each_residue(s, [&](const Axis& down, const Axis& across) {
            int64_t pixels = 0;
            for (int64_t n = 0; n < s.images; ++n)
                for (int64_t y = down.residue; y < s.height; y += s.stride_y)
                    for (int64_t c = across.residue; c < s.width; c += s.stride_x)
                        at[pixels++] = n * image + (y * s.width + c) * s.inputs;
            if (pixels == 0) return;
            const int64_t step = gram_step(pixels);
            KR_DISPATCH(gram_columns, x, at, pixels, s.inputs, columns, step);
            KR_DISPATCH(gram_matrix, columns, pixels, s.inputs, step, of_pixels);
            for (int64_t k = 0; k < s.kernel_height; ++k)
                for (int64_t l = 0; l < s.kernel_width; ++l) {
                    const Axis i = down_of(s, k), j = across_of(s, l);
                    if (i.residue != down.residue || j.residue != across.residue) continue;
                    const GramTap tap = {s.images, s.output_height, s.output_width, i.pixels, j.pixels, i.first,
                                         i.last,   j.first,         j.last,         i.shift,  j.shift};
                    square += KR_DISPATCH(gram_tap, tap, of_pixels, step, of_outputs, output_step);
                }
        });
        finish(s, record, square > 0.0 || std::isnan(square) ? square : 0.0, bias);  // rounding may leave less than 0
    }
}

void winograd_records(const ConvGradients& s, int64_t begin, int64_t end) {
    const int64_t bias = round_up(s.outputs, 16);
    const AlignedFloats memory(bias + winograd_grad_alone_memory(s.inputs, s.outputs));
    for (int64_t record = begin; record < end; ++record)
        finish(s, record, winograd_grad_alone(winograd_of(s, record), memory.floats + bias), memory.floats);
}

void direct_records(const ConvGradients& s, int64_t begin, int64_t end) {
    const DirectConvShape shape = shape_of(s, false);
    const int64_t size = round_up(direct_conv2d_sums(shape), 16), taps = s.kernel_height * s.kernel_width;
    const AlignedFloats memory(size + direct_conv2d_scratch(shape) + round_up(s.outputs, 16));
    float *sums = memory.floats + round_up(s.outputs, 16), *scratch = sums + size;
    for (int64_t record = begin; record < end; ++record) {
        direct_conv2d_grad_weight_images(shape, s.x, s.grad_output, false, record * s.images, (record + 1) * s.images,
                                         sums, true, scratch);
        double square = 0.0;
        if (s.weight)
            direct_conv2d_grad_weight_finish(shape, sums, 1, 0, s.weight + record * s.outputs * s.inputs * taps,
                                             {s.inputs * taps, taps, 1}, nullptr);
        else
            square = direct_conv2d_grad_weight_square(shape, sums);
        finish(s, record, square, memory.floats);
    }
}

// `channels` of each of `rows` pixels, and zeros up to `padded`.
void gather(const float* from, int64_t rows, int64_t step, int64_t channels, int64_t padded, float* to) {
    for (int64_t r = 0; r < rows; ++r, from += step, to += padded) {
        std::copy(from, from + channels, to);
        std::fill(to + channels, to + padded, 0.0f);
    }
}

// Any geometry, of many channels: group by group, tap by tap.
void gathered_records(const ConvGradients& s, int64_t begin, int64_t end) {
    DirectConvShape shape = shape_of(s, true);
    const int64_t inputs = s.inputs / s.groups, outputs = s.outputs / s.groups, taps = s.kernel_height * s.kernel_width;
    const int64_t pixels = s.images * s.height * s.width, rows = outputs_of(s);
    const int64_t sizes[] = {round_up(s.outputs, 16),
                             round_up(direct_conv2d_sums(shape), 16),
                             round_up(direct_conv2d_scratch(shape), 16),
                             round_up(pixels * shape.inputs, 16),
                             round_up(rows * shape.outputs, 16),
                             round_up(shape.inputs * shape.outputs, 16)};
    int64_t size = 0;
    for (const int64_t each : sizes) size += each;
    const AlignedFloats memory(size);
    float *bias = memory.floats, *sums = bias + sizes[0], *scratch = sums + sizes[1], *x = scratch + sizes[2];
    float *grad = x + sizes[3], *filters = grad + sizes[4];
    for (int64_t record = begin; record < end; ++record) {
        double square = 0.0;
        for (int64_t group = 0; group < s.groups; ++group) {
            gather(s.x + record * pixels * s.inputs + group * inputs, pixels, s.inputs, inputs, shape.inputs, x);
            gather(s.grad_output + record * rows * s.outputs + group * outputs, rows, s.outputs, outputs, shape.outputs,
                   grad);
            for (int64_t tap = 0; tap < taps; ++tap) {
                shape.pad_y = s.pad_y - tap / s.kernel_width * s.dilation_y;
                shape.pad_x = s.pad_x - tap % s.kernel_width * s.dilation_x;
                direct_conv2d_grad_weight_images(shape, x, grad, false, 0, s.images, sums, true, scratch);
                direct_conv2d_grad_weight_finish(shape, sums, 1, 0, filters, {shape.inputs, 1, 1}, nullptr);
                float* to = s.weight + ((record * s.groups + group) * outputs * inputs) * taps + tap;
                for (int64_t o = 0; o < outputs; ++o) {
                    const float* from = filters + o * shape.inputs;
                    if (!s.weight) square += KR_DISPATCH(squares, from, inputs);
                    for (int64_t c = 0; c < inputs && s.weight; ++c) to[(o * inputs + c) * taps] = from[c];
                }
            }
        }
        finish(s, record, square, bias);
    }
}

// Where each kernel row reads x, for each line of a record's dy: floats from the record's first, or -1 outside.
std::vector<int64_t> lines_of(const ConvGradients& s) {
    std::vector<int64_t> found;
    for (int64_t image = 0; image < s.images; ++image)
        for (int64_t i = 0; i < s.output_height; ++i)
            for (int64_t k = 0; k < s.kernel_height; ++k) {
                const int64_t y = i * s.stride_y - s.pad_y + k * s.dilation_y;
                const bool inside = y >= 0 && y < s.height;
                found.push_back(inside ? (image * s.height + y) * s.width * s.inputs : -1);
            }
    return found;
}

// A depthwise filter, whose channels are one block, or small groups, which are blocks. A band of lines after the other,
// so that what it reads stays in the second cache from block to block.
void windows_records(const ConvGradients& s, int64_t begin, int64_t end) {
    const bool depthwise = s.groups == s.inputs && s.groups == s.outputs;
    const int64_t blocks = depthwise ? 1 : s.groups, inputs = depthwise ? 1 : s.inputs / s.groups;
    const int64_t outputs = s.outputs / blocks, step = round_up(outputs, 16);
    const int64_t each = inputs * s.kernel_height * s.kernel_width, size = blocks * each * step;
    const int64_t lines = s.images * s.output_height, grad_line = s.output_width * s.outputs;
    const int64_t x_line = s.width * s.inputs, x_size = s.images * s.height * x_line;
    const int64_t band = std::max(kBandFloats / (s.stride_y * x_line + grad_line), kBandPixels / s.output_width) + 1;
    const int64_t x_share = band * x_size / lines / blocks, grad_share = band * grad_line / blocks;
    const std::vector<int64_t> reads = lines_of(s);
    const AlignedFloats memory(size + round_up(s.outputs, 16) + x_line + 16);
    float *sums = memory.floats, *bias = sums + size, *zeros = bias + round_up(s.outputs, 16);
    std::fill(zeros, zeros + x_line + 16, 0.0f);
    for (int64_t record = begin; record < end; ++record) {
        const float *x = s.x + record * x_size, *grad = s.grad_output + record * lines * grad_line;
        std::fill(sums, sums + size, 0.0f);
        for (int64_t line = 0; line < lines; line += band)
            for (int64_t block = 0; block < blocks; ++block) {
                const Windows windows = {x + block * inputs,
                                         grad + line * grad_line + block * outputs,
                                         reads.data() + line * s.kernel_height,
                                         std::min(band, lines - line),
                                         zeros,
                                         inputs,
                                         outputs,
                                         sums + block * each * step,
                                         step,
                                         x + (line + band) * x_size / lines + block * x_share,
                                         grad + (line + band) * grad_line + block * grad_share,
                                         x_share * 8 / step,
                                         grad_share * 8 / step};
                if (depthwise)
                    KR_DISPATCH(add_windows<true>, s, windows);
                else
                    KR_DISPATCH(add_windows<false>, s, windows);
            }
        for (int64_t o = 0; o < s.outputs && s.weight; ++o)
            for (int64_t e = 0; e < each; ++e)
                s.weight[(record * s.outputs + o) * each + e] = sums[(o / outputs * each + e) * step + o % outputs];
        finish(s, record, s.weight ? 0.0 : KR_DISPATCH(squares, sums, size), bias);
    }
}

}  // namespace

void conv2d_grad_norms(const ConvGradients& call, int threads) {
    const Form form = form_of(call);
    parallel_for(call.records, 1, threads, [&](int64_t begin, int64_t end) {
        if (form == Form::gram)
            gram_records(call, begin, end);
        else if (form == Form::winograd)
            winograd_records(call, begin, end);
        else if (form == Form::direct)
            direct_records(call, begin, end);
        else if (form == Form::windows)
            windows_records(call, begin, end);
        else
            gathered_records(call, begin, end);
    });
}

}  // namespace kr
