#include "cpu/nn/direct_conv2d.h"

#include <memory>

#include "cpu/simd/parallel.h"

namespace kr {
namespace {

// A product of patches of `taps_y` by `taps_x` pixels of a source with filters. Row (i, j) reads from pixel
// (i step + origin) on and is written to pixel (to_first + i to_step). The forward pass is one; the gradient of the
// input is one for each residue of pixels by the stride, which have taps of their own.
struct DirectPass {
    int64_t height, width, channels, taps_y, taps_x;
    int64_t step_y, step_x, origin_y, origin_x, rows_y, rows_x;
    int64_t to_height, to_width, to_channels, to_first_y, to_first_x, to_step_y, to_step_x;
};

// Rows [first, last) of one axis that take the same taps.
struct DirectRun {
    int64_t first, last, first_tap, last_tap;
};

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
float* aligned(float* memory) { return memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / 4; }

// Few outputs: sums over vectors of channels, not products with vectors of outputs.
bool has_few_outputs(const DirectPass& pass) { return pass.to_channels <= 4 && pass.channels >= 8; }

// Few inputs: taps of a line by inputs are the inputs of a product, from lines of x that are padded with zeros.
bool has_few_inputs(const DirectConvShape& s) { return s.inputs % 4 != 0; }
int64_t direct_padded_line(const DirectConvShape& s) { return round_up((s.width + 2 * s.pad_x) * s.inputs, 16) + 16; }

// Sums are [kernel height][direct_rows: taps of a line by inputs][direct_columns: outputs].
int64_t direct_rows(const DirectConvShape& s) {
    const int64_t length = s.kernel_width * s.inputs;
    return has_few_inputs(s) ? round_up(length, 4) : length;
}
int64_t direct_columns(const DirectConvShape& s) { return round_up(s.outputs, 16); }

}  // namespace
}  // namespace kr

#define KR_KERNEL "cpu/nn/kernels/direct_conv2d_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {
namespace {

// Floats of images that a group of them may hold: half of a second-level cache of 1 MB.
constexpr int64_t kGroupFloats = 128 * 1024;
// Floats of x and dy that are summed in one go, read again for each tap and tile of inputs by outputs: products of
// AVX-512 read each less often, and find it in the second cache.
constexpr int64_t kBlockFloats = 16 * 1024, kSmallBlockFloats = 6 * 1024;
constexpr int64_t kBlockPixels = 96;  // at least: registers are added to the sums after so many
// Chunks of images, whose number depends on the shape only: a sum costs as much as some ten pixels.
constexpr int64_t kMostChunks = 16, kFewestPixels = 1024, kFewestOfFew = 256;

DirectPass forward_pass(const DirectConvShape& s) {
    const int64_t down = s.output_height, across = s.output_width;
    return {s.height, s.width, s.inputs, s.kernel_height, s.kernel_width, s.stride_y, s.stride_x, -s.pad_y, -s.pad_x,
            down,     across,  down,     across,          s.outputs,      0,          0,          1,        1};
}

// Pixels residue, residue + stride, ... of an axis of the input: the first tap that reaches them, their number of taps,
// and where in the output the last of the taps reads for the first pixel.
struct Residue {
    int64_t tap, taps, origin, rows;
};
Residue residue_of(int64_t residue, int64_t size, int64_t kernel, int64_t stride, int64_t pad) {
    const int64_t tap = (residue + pad) % stride, taps = tap < kernel ? (kernel - 1 - tap) / stride + 1 : 0;
    return {tap, taps, (residue + pad) / stride - taps + 1, residue < size ? (size - residue - 1) / stride + 1 : 0};
}

// Calls body(pass, offset of its packed filters, offset of its first tap, floats between its taps).
template <class Body>
void for_each_pass(const DirectConvShape& s, bool grad_input, const DirectConvSteps& steps, const Body& body) {
    const int64_t line = s.kernel_width * steps.tap;
    if (!grad_input) return body(forward_pass(s), int64_t{0}, int64_t{0}, line, steps.tap);
    int64_t offset = 0;
    for (int64_t a = 0; a < s.stride_y; ++a)
        for (int64_t b = 0; b < s.stride_x; ++b) {
            const Residue y = residue_of(a, s.height, s.kernel_height, s.stride_y, s.pad_y);
            const Residue x = residue_of(b, s.width, s.kernel_width, s.stride_x, s.pad_x);
            const DirectPass pass = {
                s.output_height, s.output_width, s.outputs, y.taps,  x.taps,   1, 1, y.origin,   x.origin,
                y.rows,          x.rows,         s.height,  s.width, s.inputs, a, b, s.stride_y, s.stride_x};
            const int64_t first =
                (y.tap + s.stride_y * (y.taps - 1)) * line + (x.tap + s.stride_x * (x.taps - 1)) * steps.tap;
            body(pass, offset, first, -s.stride_y * line, -s.stride_x * steps.tap);
            offset += y.taps * x.taps * s.outputs * round_up(s.inputs, 16);
        }
}

// The taps of row i of an axis that are inside.
DirectRun taps_of(int64_t i, int64_t step, int64_t origin, int64_t taps, int64_t size) {
    const int64_t at = i * step + origin, first = at < 0 ? smaller(-at, taps) : 0, last = smaller(size - at, taps);
    return first < last ? DirectRun{i, i + 1, first, last} : DirectRun{i, i + 1, 0, 0};
}

template <class Body>
void for_each_run(int64_t rows, int64_t step, int64_t origin, int64_t taps, int64_t size, const Body& body) {
    for (int64_t i = 0; i < rows;) {
        DirectRun run = taps_of(i, step, origin, taps, size);
        for (++i; i < rows; ++i, ++run.last) {
            const DirectRun next = taps_of(i, step, origin, taps, size);
            if (next.first_tap != run.first_tap || next.last_tap != run.last_tap) break;
        }
        body(run);
    }
}

// One pass over images [begin, end).
void run_pass(const DirectPass& p, const float* source, const float* packed, const float* bias, float* to,
              bool accumulate, int64_t begin, int64_t end) {
    for_each_run(p.rows_y, p.step_y, p.origin_y, p.taps_y, p.height, [&](const DirectRun& down) {
        for_each_run(p.rows_x, p.step_x, p.origin_x, p.taps_x, p.width, [&](const DirectRun& across) {
            const bool empty = down.first_tap == down.last_tap || across.first_tap == across.last_tap;
            if (accumulate && empty) return;
            KR_DISPATCH(direct_run, p, down, across, source, packed, bias, to, accumulate, begin, end);
        });
    });
}

// What the gradient of the filters is computed as. With few outputs dy and x change places, so that vectors are of
// inputs: dw[o][c][k][l] = sum over pixels (i, j) of x of x[i, j, c] dy[i + pad - k, j + pad - l, o] is the gradient of
// a convolution of dy by turned filters.
struct GradForm {
    DirectConvShape shape;
    bool swapped;
};

GradForm grad_form(const DirectConvShape& s) {
    const bool swaps = s.outputs <= 4 && s.outputs < s.inputs && s.stride_y == 1 && s.stride_x == 1 &&
                       s.pad_y < s.kernel_height && s.pad_x < s.kernel_width;
    if (!swaps) return {s, false};
    return {{s.output_height, s.output_width, s.outputs, s.height, s.width, s.inputs, s.kernel_height, s.kernel_width,
             1, 1, s.kernel_height - 1 - s.pad_y, s.kernel_width - 1 - s.pad_x},
            true};
}

// Lines of pixels in a block of the gradient of the filters.
int64_t block_lines(const DirectConvShape& s) {
    const int64_t floats = isa() == Isa::avx512 ? kBlockFloats : kSmallBlockFloats;
    const int64_t pixels = larger(kBlockPixels, floats / (s.stride_y * s.stride_x * s.inputs + s.outputs));
    return (pixels + s.output_width - 1) / s.output_width;
}

// Sums of taps [from, to), or of all with few inputs, over images [begin, end).
void sum_images(const GradForm& form, const float* x, const float* grad_y, int64_t begin, int64_t end, int64_t from,
                int64_t to, float* sums, bool first, float* scratch) {
    const DirectConvShape& s = form.shape;
    const float *source = form.swapped ? grad_y : x, *grad = form.swapped ? x : grad_y;
    const int64_t last = end * s.output_height, lines = block_lines(s);
    for (int64_t line = begin * s.output_height; line < last; line += lines, first = false) {
        const int64_t stop = smaller(line + lines, last);
        if (has_few_inputs(s))
            KR_DISPATCH(direct_grad_few, s, source, grad, line, stop, sums, !first, scratch);
        else
            KR_DISPATCH(direct_grad_lines, s, source, grad, line, stop, from, to, sums, !first,
                        reinterpret_cast<int64_t*>(scratch));
    }
}

void finish_filters(const GradForm& form, const float* sums, int64_t chunks, int64_t chunk_step, float* grad_weight,
                    const DirectConvSteps& steps, int64_t from, int64_t to) {
    const int64_t last = form.shape.kernel_height * form.shape.kernel_width - 1;
    if (form.swapped)
        KR_DISPATCH(direct_grad_filters, form.shape, sums, chunks, chunk_step, grad_weight + last * steps.tap,
                    {steps.input, steps.output, -steps.tap}, from, to);
    else
        KR_DISPATCH(direct_grad_filters, form.shape, sums, chunks, chunk_step, grad_weight, steps, from, to);
}

int64_t filter_sums(const GradForm& form) {
    return form.shape.kernel_height * direct_rows(form.shape) * direct_columns(form.shape);
}

void sum_bias(const DirectConvShape& s, const float* grad_y, int64_t begin, int64_t end, float* sums, bool first) {
    KR_DISPATCH(direct_grad_bias, s, grad_y, begin * s.output_height, end * s.output_height,
                sums + filter_sums(grad_form(s)), !first);
}

void finish_bias(const DirectConvShape& s, const float* sums, int64_t chunks, int64_t chunk_step, float* grad_bias) {
    const float* from = sums + filter_sums(grad_form(s));
    for (int64_t o = 0; o < s.outputs; ++o) {
        float sum = 0.0f;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += from[chunk * chunk_step + o];
        grad_bias[o] = sum;
    }
}

}  // namespace

int64_t direct_conv2d_packed_size(const DirectConvShape& s, bool grad_input) {
    const int64_t to = grad_input ? s.inputs : s.outputs, from = grad_input ? s.outputs : s.inputs;
    return s.kernel_height * s.kernel_width * from * round_up(to, 16);
}

void direct_conv2d_pack(const DirectConvShape& s, const float* weight, const DirectConvSteps& steps, bool grad_input,
                        float* packed) {
    const int64_t from = grad_input ? steps.output : steps.input, to = grad_input ? steps.input : steps.output;
    for_each_pass(s, grad_input, steps,
                  [&](const DirectPass& pass, int64_t offset, int64_t first, int64_t down, int64_t across) {
                      KR_DISPATCH(direct_pack_pass, pass, weight + first, down, across, from, to, packed + offset);
                  });
}

int64_t direct_conv2d_scratch(const DirectConvShape& shape) {
    const DirectConvShape s = grad_form(shape).shape;
    const int64_t lines = block_lines(s), padded = lines * larger(s.kernel_height, s.stride_y) * direct_padded_line(s);
    return round_up(4 * lines + (has_few_inputs(s) ? padded : 0), 16) + 16;
}

void direct_conv2d_images(const DirectConvShape& s, const float* x, const float* packed, const float* bias, float* y,
                          int64_t begin, int64_t end) {
    const DirectPass pass = forward_pass(s);
    const int64_t size = s.height * s.width * s.inputs + s.output_height * s.output_width * s.outputs;
    const int64_t group = larger(1, kGroupFloats / size);
    for (int64_t n = begin; n < end; n += group) run_pass(pass, x, packed, bias, y, false, n, smaller(n + group, end));
}

void direct_conv2d_grad_input_images(const DirectConvShape& s, const float* grad_y, const float* packed, float* grad_x,
                                     bool accumulate, int64_t begin, int64_t end) {
    const int64_t size = s.height * s.width * s.inputs + s.output_height * s.output_width * s.outputs;
    const int64_t group = larger(1, kGroupFloats / size);
    for (int64_t n = begin; n < end; n += group)
        for_each_pass(s, true, {}, [&](const DirectPass& pass, int64_t offset, int64_t, int64_t, int64_t) {
            run_pass(pass, grad_y, packed + offset, nullptr, grad_x, accumulate, n, smaller(n + group, end));
        });
}

int64_t direct_conv2d_sums(const DirectConvShape& s) { return filter_sums(grad_form(s)) + direct_columns(s); }

void direct_conv2d_grad_weight_images(const DirectConvShape& s, const float* x, const float* grad_y, bool bias,
                                      int64_t begin, int64_t end, float* sums, bool first, float* scratch) {
    const int64_t taps = s.kernel_height * s.kernel_width;
    sum_images(grad_form(s), x, grad_y, begin, end, 0, taps, sums, first, scratch);
    if (bias) sum_bias(s, grad_y, begin, end, sums, first);
}

void direct_conv2d_grad_weight_finish(const DirectConvShape& s, const float* sums, int64_t chunks, int64_t chunk_step,
                                      float* grad_weight, const DirectConvSteps& steps, float* grad_bias) {
    const int64_t taps = s.kernel_height * s.kernel_width;
    finish_filters(grad_form(s), sums, chunks, chunk_step, grad_weight, steps, 0, taps);
    if (grad_bias != nullptr) finish_bias(s, sums, chunks, chunk_step, grad_bias);
}

double direct_conv2d_grad_weight_square(const DirectConvShape& s, const float* sums) {
    return KR_DISPATCH(direct_grad_square, grad_form(s).shape, sums);
}

void direct_conv2d(const DirectConv& call, int threads) {
    const DirectConvShape& s = call.shape;
    const std::unique_ptr<float[]> filters(new float[direct_conv2d_packed_size(s, false) + 16]);
    float* packed = aligned(filters.get());
    direct_conv2d_pack(s, call.weight, call.steps, false, packed);
    parallel_for(call.batch, 1, threads, [&](int64_t begin, int64_t end) {
        direct_conv2d_images(s, call.x, packed, call.bias, call.y, begin, end);
    });
}

namespace {

void grad_input(const DirectConvBackward& call, int threads) {
    const DirectConvShape& s = call.shape;
    const std::unique_ptr<float[]> filters(new float[direct_conv2d_packed_size(s, true) + 16]);
    float* packed = aligned(filters.get());
    direct_conv2d_pack(s, call.weight, call.steps, true, packed);
    parallel_for(call.batch, 1, threads, [&](int64_t begin, int64_t end) {
        direct_conv2d_grad_input_images(s, call.grad_y, packed, call.grad_x, false, begin, end);
    });
}

// Chunks of images by parts of their taps are shared by the threads; a chunk's sums are the same whatever the parts.
void grad_filters(const DirectConvBackward& call, int threads) {
    const DirectConvShape& s = call.shape;
    const GradForm form = grad_form(s);
    const int64_t pixels = call.batch * s.output_height * s.output_width, taps = s.kernel_height * s.kernel_width;
    const int64_t fewest = has_few_inputs(form.shape) ? kFewestOfFew : kFewestPixels;
    int64_t chunks = 1;
    while (2 * chunks <= kMostChunks && 2 * chunks <= call.batch && pixels >= 2 * chunks * fewest) chunks *= 2;
    const int64_t parts = has_few_inputs(form.shape) || chunks == kMostChunks ? 1 : taps;
    const int64_t size = direct_conv2d_sums(s);
    const std::unique_ptr<float[]> memory(new float[chunks * size + 16]);
    float* sums = aligned(memory.get());
    parallel_for(chunks * parts, 1, threads, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> own(new float[direct_conv2d_scratch(s) + 16]);
        while (begin < end) {  // the parts of one chunk together
            const int64_t chunk = begin / parts, from = begin % parts, to = smaller(from + end - begin, parts);
            const int64_t first = call.batch * chunk / chunks, last = call.batch * (chunk + 1) / chunks;
            if (call.grad_weight)
                sum_images(form, call.x, call.grad_y, first, last, taps * from / parts, taps * to / parts,
                           sums + chunk * size, true, aligned(own.get()));
            if (call.grad_bias && from == 0) sum_bias(s, call.grad_y, first, last, sums + chunk * size, true);
            begin += to - from;
        }
    });
    if (call.grad_bias) finish_bias(s, sums, chunks, size, call.grad_bias);
    if (call.grad_weight == nullptr) return;
    parallel_for(taps, 1, threads, [&](int64_t begin, int64_t end) {
        finish_filters(form, sums, chunks, size, call.grad_weight, call.grad_steps, begin, end);
    });
}

}  // namespace

void direct_conv2d_backward(const DirectConvBackward& call, int threads) {
    if (call.grad_x) grad_input(call, threads);
    if (call.grad_weight || call.grad_bias) grad_filters(call, threads);
}

}  // namespace kr
