// Included once per instruction set by group_norm_silu.cpp.
//
// One sample is read from memory once: its statistics are taken in chunks of pixels that fit L1 (the mean of a chunk,
// then the squares about it, joined by Chan's rule), and the second sweep finds the sample in L2. There it is one
// multiply-add a channel, because shift, mean, deviation, weight and bias fold into y = act(a_c x + b_c).
#include "cpu/simd/row_io.h"
#include "cpu/simd/vec_math.h"

#include "cpu/nn/kernels/activations.h"

constexpr int64_t kChunkElements = 4096;

// Pixels of a chunk: 16 KB of float32, but not so few that joining chunks costs more than their sums.
KR_FN int64_t chunk_pixels(int64_t channels) {
    const int64_t pixels = kChunkElements / (channels + 1);
    return pixels < 16 ? 16 : pixels;
}

// Joins the statistics of n pixels of V vectors of channels to those of the `before` pixels so far. `live` is the
// number of lanes that exist where V is 1, else kLanes.
template <int V, class T>
KR_FN void add_chunk(const T* x, int64_t step, int64_t n, int64_t before, float* mean, float* squares, int live) {
    auto read = [=](const T* from) { return live == kLanes ? load_as(from) : load_as_part(from, live); };
    f32v sum[V] = {}, square[V] = {};
    for (int64_t p = 0; p < n; ++p) {
        KR_UNROLL for (int v = 0; v < V; ++v) sum[v] = sum[v] + read(x + p * step + v * kLanes);
    }
    const f32v share = splat(1.0f / (float)n);
    KR_UNROLL for (int v = 0; v < V; ++v) sum[v] = sum[v] * share;
    for (int64_t p = 0; p < n; ++p) {
        KR_UNROLL for (int v = 0; v < V; ++v) {
            const f32v d = read(x + p * step + v * kLanes) - sum[v];
            square[v] = fma(d, d, square[v]);
        }
    }
    const float total = (float)(before + n);
    const f32v weight = splat((float)n / total), cross = splat((float)before * ((float)n / total));
    KR_UNROLL for (int v = 0; v < V; ++v) {
        float *m = mean + v * kLanes, *s = squares + v * kLanes;
        const f32v old = before ? load(m) : splat(0.0f), d = sum[v] - old;
        const f32v joined = before ? load(s) + fma(d * d, cross, square[v]) : square[v];
        store(m, before ? fma(d, weight, old) : sum[v]);
        store(s, joined);
    }
}

// Mean and sum of squares about it of each channel of one source; the arrays have room for whole vectors.
template <class T>
static void channel_statistics(const T* x, int64_t step, int64_t channels, int64_t pixels, float* mean,
                               float* squares) {
    const int64_t chunk = chunk_pixels(step);  // by the whole row, so that the sums do not depend on how it is cut
    for (int64_t p = 0; p < pixels; p += chunk) {
        const int64_t n = pixels - p < chunk ? pixels - p : chunk;
        const T* from = x + p * step;
        int64_t c = 0;
        for (; c + 4 * kLanes <= channels; c += 4 * kLanes)
            add_chunk<4>(from + c, step, n, p, mean + c, squares + c, kLanes);
        for (; c + 2 * kLanes <= channels; c += 2 * kLanes)
            add_chunk<2>(from + c, step, n, p, mean + c, squares + c, kLanes);
        for (; c + kLanes <= channels; c += kLanes) add_chunk<1>(from + c, step, n, p, mean + c, squares + c, kLanes);
        if (c < channels) add_chunk<1>(from + c, step, n, p, mean + c, squares + c, (int)(channels - c));
    }
}

template <int V, NormEnd end, class T>
KR_FN void apply_chunk(const T* x, int64_t step, T* y, int64_t y_step, int64_t n, const float* a, const float* b,
                       const T* residual, int live) {
    f32v scale[V], offset[V];
    KR_UNROLL for (int v = 0; v < V; ++v) scale[v] = load(a + v * kLanes), offset[v] = load(b + v * kLanes);
    for (int64_t p = 0; p < n; ++p) {
        KR_UNROLL for (int v = 0; v < V; ++v) {
            const auto read = [=](const T* from) { return live == kLanes ? load_as(from) : load_as_part(from, live); };
            f32v out = fma(read(x + p * step + v * kLanes), scale[v], offset[v]);
            if (end == NormEnd::silu) out = silu(out);
            if (end == NormEnd::sum_relu) out = out + read(residual + p * y_step + v * kLanes);
            if (end == NormEnd::relu || end == NormEnd::sum_relu) out = max(splat(0.0f), out);  // out where it is NaN
            if (live == kLanes)
                store_as(y + p * y_step + v * kLanes, out);
            else
                store_as_part(y + p * y_step + v * kLanes, out, live);
        }
    }
}

template <NormEnd end, class T>
static void apply_channels(const T* x, int64_t step, int64_t channels, T* y, int64_t y_step, int64_t pixels,
                           const float* a, const float* b, const T* residual) {
    const int64_t chunk = chunk_pixels(step);
    for (int64_t p = 0; p < pixels; p += chunk) {
        const int64_t n = pixels - p < chunk ? pixels - p : chunk;
        const T *from = x + p * step, *other = end == NormEnd::sum_relu ? residual + p * y_step : x;
        T* to = y + p * y_step;
        int64_t c = 0;
        for (; c + 2 * kLanes <= channels; c += 2 * kLanes)
            apply_chunk<2, end>(from + c, step, to + c, y_step, n, a + c, b + c, other + c, kLanes);
        for (; c + kLanes <= channels; c += kLanes)
            apply_chunk<1, end>(from + c, step, to + c, y_step, n, a + c, b + c, other + c, kLanes);
        const int live = (int)(channels - c);
        if (c < channels) apply_chunk<1, end>(from + c, step, to + c, y_step, n, a + c, b + c, other + c, live);
    }
}

// Channels [first, last) of one sample, whole groups. Arrays over channels have room for a vector more; mean and
// squares come in as scratch and leave as a and b.
template <class T>
static void norm_part(const GroupNorm& call, int64_t sample, int64_t first, int64_t last, const float* weight,
                      const float* bias, const float* shift, float* mean, float* squares,
                      const GroupNormStatistics& out, const GroupNormRelu* relu) {
    const int64_t channels = call.x_channels + call.skip_channels, size = channels / call.groups;
    const T* sources[2] = {static_cast<const T*>(call.x) + sample * call.pixels * call.x_channels,
                           static_cast<const T*>(call.skip) + sample * call.pixels * call.skip_channels};
    const int64_t widths[2] = {call.x_channels, call.skip_channels};
    T* y = static_cast<T*>(call.y) + sample * call.pixels * channels;
    for (int s = 0; s < 2; ++s) {
        const int64_t start = s ? call.x_channels : 0;
        const int64_t begin = first > start ? first : start, end = last < start + widths[s] ? last : start + widths[s];
        // The second source after the first: whole vectors of the first may write past its end.
        if (begin < end)
            channel_statistics(sources[s] + begin - start, widths[s], end - begin, call.pixels, mean + begin,
                               squares + begin);
    }
    for (int64_t g = first; g < last; g += size) {
        float centre = 0.0f, spread = 0.0f;
        if (shift)
            for (int64_t c = g; c < g + size; ++c) mean[c] += shift[c];
        for (int64_t c = g; c < g + size; ++c) centre += mean[c];
        centre /= (float)size;
        for (int64_t c = g; c < g + size; ++c) {
            const float d = mean[c] - centre;
            spread += squares[c] + (float)call.pixels * d * d;
        }
        const float rstd = 1.0f / __builtin_sqrtf(spread / ((float)call.pixels * (float)size) + call.eps);
        if (out.mean) {
            out.mean[sample * call.groups + g / size] = centre;
            out.rstd[sample * call.groups + g / size] = rstd;
        }
        for (int64_t c = g; c < g + size; ++c) {
            const float a = weight ? weight[c] * rstd : rstd;
            mean[c] = a;
            squares[c] = (bias ? bias[c] : 0.0f) + ((shift ? shift[c] : 0.0f) - centre) * a;
        }
    }
    for (int s = 0; s < 2; ++s) {
        const int64_t start = s ? call.x_channels : 0;
        const int64_t begin = first > start ? first : start, end = last < start + widths[s] ? last : start + widths[s];
        if (begin >= end) continue;
        const T* x = sources[s] + begin - start;
        const auto apply = [&](auto kind, const T* residual) {
            apply_channels<decltype(kind)::value>(x, widths[s], end - begin, y + begin, channels, call.pixels,
                                                  mean + begin, squares + begin, residual);
        };
        if constexpr (sizeof(T) == sizeof(float)) {
            if (relu && relu->residual) {
                const float* from = relu->residual + sample * call.pixels * channels + begin;
                apply(std::integral_constant<NormEnd, NormEnd::sum_relu>{}, from);
                continue;
            }
            if (relu) {
                apply(std::integral_constant<NormEnd, NormEnd::relu>{}, nullptr);
                continue;
            }
        }
        if (call.silu)
            apply(std::integral_constant<NormEnd, NormEnd::silu>{}, nullptr);
        else
            apply(std::integral_constant<NormEnd, NormEnd::none>{}, nullptr);
    }
}

static void norm_part_of(const GroupNorm& call, int64_t sample, int64_t first, int64_t last, const float* weight,
                         const float* bias, const float* shift, float* mean, float* squares,
                         const GroupNormStatistics& out, const GroupNormRelu* relu) {
    if (call.dtype == Dtype::f32)
        norm_part<float>(call, sample, first, last, weight, bias, shift, mean, squares, out, relu);
    else if (call.dtype == Dtype::bf16)
        norm_part<Bf16>(call, sample, first, last, weight, bias, shift, mean, squares, out, relu);
    else
        norm_part<F16>(call, sample, first, last, weight, bias, shift, mean, squares, out, relu);
}

static const float* norm_floats(const void* from, Dtype dtype, int64_t offset, int64_t n, float* scratch) {
    return to_float_row(from, dtype, offset, n, scratch);
}
