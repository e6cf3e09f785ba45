// Included once per instruction set, by direct_conv2d_kernel.h: filters to the layout of the products, and sums to
// filters.
#include "cpu/simd/doubles.h"
#include "cpu/simd/transpose.h"

// Lane r of the result is the sum of the lanes of m[r], which is overwritten.
KR_FN f32v sum_rows(f32v (&m)[kLanes]) {
#if KR_LANES > 1
    KR_UNROLL for (int half = kLanes / 2; half > 0; half /= 2) KR_UNROLL for (int r = 0; r < half; ++r) m[r] =
        interleave_lower(m[r], m[r + half]) + interleave_upper(m[r], m[r + half]);
#endif
    return m[0];
}

// Outputs [first, first + block) of one tap: to[channel][block] of from[channel channel_step + output output_step],
// zeros beyond `live`.
static void pack_tap(const float* from, int64_t channel_step, int64_t output_step, int64_t channels, int64_t live,
                     int64_t block, float* to) {
    for (int64_t o = 0; o < block; o += kLanes) {
        const int64_t left = live - o;
        const int count = left < 0 ? 0 : left < kLanes ? (int)left : kLanes;
        int64_t c = 0;
        if (output_step == 1) {
            for (; c < channels; ++c)
                store(to + c * block + o, load_part(from + c * channel_step + (count ? o : 0), count, 0.0f));
            continue;
        }
        if (channel_step == 1) {
            for (; c + kLanes <= channels; c += kLanes) {
                f32v m[kLanes];
                KR_UNROLL for (int r = 0; r < kLanes; ++r) m[r] =
                    r < count ? load(from + c + (o + r) * output_step) : splat(0.0f);
                transpose(m);
                KR_UNROLL for (int r = 0; r < kLanes; ++r) store(to + (c + r) * block + o, m[r]);
            }
        }
        for (; c < channels; ++c)
            for (int r = 0; r < kLanes; ++r)
                to[c * block + o + r] = r < count ? from[c * channel_step + (o + r) * output_step] : 0.0f;
    }
}

// Filters of one pass: a tap is `down` and `across` floats from the next.
static void direct_pack_pass(const DirectPass& pass, const float* weight, int64_t down, int64_t across,
                             int64_t channel_step, int64_t output_step, float* packed) {
    if (has_few_outputs(pass)) {
        for (int64_t o = 0; o < pass.to_channels; ++o)
            for (int64_t k = 0; k < pass.taps_y; ++k)
                for (int64_t l = 0; l < pass.taps_x; ++l)
                    for (int64_t c = 0; c < pass.channels; ++c)
                        *packed++ = weight[o * output_step + k * down + l * across + c * channel_step];
        return;
    }
    for (int64_t first = 0; first < pass.to_channels;) {
        const int64_t left = pass.to_channels - first, block = left > 16 ? 32 : 16, live = left < block ? left : block;
        for (int64_t k = 0; k < pass.taps_y; ++k)
            for (int64_t l = 0; l < pass.taps_x; ++l, packed += pass.channels * block)
                pack_tap(weight + k * down + l * across + first * output_step, channel_step, output_step, pass.channels,
                         live, block, packed);
        first += block;
    }
}

// The gradient of taps [from, to): `chunks` sums [taps][inputs][columns] added in their order.
static void direct_grad_filters(const DirectConvShape& s, const float* sums, int64_t chunks, int64_t chunk_step,
                                float* grad_weight, const DirectConvSteps& steps, int64_t from, int64_t to) {
    const int64_t columns = direct_columns(s);
    for (int64_t tap = from; tap < to; ++tap) {
        const int64_t row = tap / s.kernel_width * direct_rows(s) + tap % s.kernel_width * s.inputs;
        for (int64_t o = 0; o < s.outputs; o += kLanes) {
            const int live = s.outputs - o < kLanes ? (int)(s.outputs - o) : kLanes;
            for (int64_t i = 0; i < s.inputs; i += kLanes) {
                const int high = s.inputs - i < kLanes ? (int)(s.inputs - i) : kLanes;
                f32v m[kLanes];
                KR_UNROLL for (int r = 0; r < kLanes; ++r) {
                    m[r] = splat(0.0f);
                    if (r >= high) continue;
                    const float* at = sums + (row + i + r) * columns + o;
                    m[r] = load(at);
                    for (int64_t chunk = 1; chunk < chunks; ++chunk) m[r] = m[r] + load(at + chunk * chunk_step);
                }
                float* out = grad_weight + tap * steps.tap + i * steps.input + o * steps.output;
                if (steps.input == 1) {
                    transpose(m);
                    KR_UNROLL for (int r = 0; r < kLanes; ++r) if (r < live)
                        store_part(out + r * steps.output, m[r], high);
                    continue;
                }
                KR_UNROLL for (int r = 0; r < kLanes; ++r) {
                    alignas(64) float lanes[kLanes];
                    store(lanes, m[r]);
                    for (int lane = 0; r < high && lane < live; ++lane)
                        out[r * steps.input + lane * steps.output] = lanes[lane];
                }
            }
        }
    }
}

// The sum of the squares of all filters, from sums [taps][inputs][columns].
static double direct_grad_square(const DirectConvShape& s, const float* sums) {
    const int64_t columns = direct_columns(s), length = s.kernel_width * s.inputs;
    double square = 0.0;
    for (int64_t k = 0; k < s.kernel_height; ++k) {
        const float* from = sums + k * direct_rows(s) * columns;
        if (columns == s.outputs)
            square += sum_squares(from, length * columns);
        else
            for (int64_t r = 0; r < length; ++r, from += columns) square += sum_squares(from, s.outputs);
    }
    return square;
}
