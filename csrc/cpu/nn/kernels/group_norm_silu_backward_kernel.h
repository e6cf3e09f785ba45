// Included once per instruction set by group_norm_silu.cpp, with the forward pass.
//
// With n = (u - mean) rstd and z = weight n + bias, dz = g act'(z) and a count of pixels times channels of a group:
// du = rstd (weight dz - sum(weight dz) / count - n sum(weight dz n) / count). A sample is read from memory once: the
// second sweep finds it in L2, and dz, which costs an exponential, in the place of du.
#include "cpu/nn/kernels/group_norm_silu_kernel.h"

#include "cpu/nn/kernels/column_blocks.h"

constexpr int kGradientVectors = KR_LANES == 16 ? 2 : 1;  // of SiLU's slope, that leave registers for the factors

// Sums of dz and dz (u - mean) of each channel, added to those of the chunks before. With ReLU dz is the gradient where
// y, `made`, is above 0, or NaN.
template <bool kAct, bool kRelu, bool kKeep, class T>
struct GroupSums {
    template <int V>
    KR_FN void run(const T* grad, int64_t grad_step, const T* made, const T* x, int64_t step, T* kept, int64_t pixels,
                   const float* mean, const float* scale, const float* offset, float* plain, float* centred, int64_t c,
                   int live) {
        f32v one[V] = {}, two[V] = {}, m[V], a[V], b[V];
        KR_UNROLL for (int v = 0; v < V; ++v) {
            const int64_t at = c + v * kLanes;
            m[v] = load(mean + at), a[v] = load(scale + at), b[v] = load(offset + at);
        }
        for (int64_t p = 0; p < pixels; ++p) {
            KR_UNROLL for (int v = 0; v < V; ++v) {
                const int64_t at = p * step + c + v * kLanes;
                const f32v d = read(x + at, live) - m[v];
                f32v g = read(grad + p * grad_step + c + v * kLanes, live);
                if (kAct) g = g * silu_slope(fma(d, a[v], b[v]));
                if (kRelu) g = read(made + at, live) <= splat(0.0f) ? splat(0.0f) : g;
                if (kKeep) write(kept + at, g, live);
                one[v] = one[v] + g;
                two[v] = fma(g, d, two[v]);
            }
        }
        KR_UNROLL for (int v = 0; v < V; ++v) {
            float *one_at = plain + c + v * kLanes, *two_at = centred + c + v * kLanes;
            write(one_at, read(one_at, live) + one[v], live);
            write(two_at, read(two_at, live) + two[v], live);
        }
    }
};

// du = scale dz + slope (u - mean) + level, and its sum, which is the gradient of the shift.
template <bool kAct, bool kKept, class T>
struct GroupInputGradient {
    template <int V>
    KR_FN void run(const T* grad, int64_t grad_step, const T* x, int64_t step, const T* kept, T* out, int64_t pixels,
                   const float* mean, const float* scale, const float* offset, const float* slope, const float* level,
                   float* sums, int64_t c, int live) {
        f32v sum[V] = {}, m[V], a[V], b[V], s[V], l[V];
        KR_UNROLL for (int v = 0; v < V; ++v) {
            const int64_t at = c + v * kLanes;
            m[v] = load(mean + at), a[v] = load(scale + at), b[v] = load(offset + at);
            s[v] = load(slope + at), l[v] = load(level + at);
        }
        for (int64_t p = 0; p < pixels; ++p) {
            KR_UNROLL for (int v = 0; v < V; ++v) {
                const int64_t at = p * step + c + v * kLanes;
                const f32v d = read(x + at, live) - m[v];
                f32v g = kKept ? read(kept + at, live) : read(grad + p * grad_step + c + v * kLanes, live);
                if (kAct && !kKept) g = g * silu_slope(fma(d, a[v], b[v]));
                g = fma(g, a[v], fma(d, s[v], l[v]));
                write(out + at, g, live);
                sum[v] = sum[v] + g;
            }
        }
        KR_UNROLL for (int v = 0; v < V; ++v) {
            float* at = sums + c + v * kLanes;
            write(at, read(at, live) + sum[v], live);
        }
    }
};

// Arrays over the channels, each with room for a vector more.
struct GroupFactors {
    float *mean, *scale, *offset, *plain, *centred, *slope, *level, *shift;
};

template <bool kAct, bool kRelu, class T>
static void gradient_part(const GroupNorm& call, const GroupNormGradient& grads, int64_t sample, int64_t first,
                          int64_t last, const float* weight, const float* bias, const float* shift,
                          const GroupFactors& f, float* partial) {
    constexpr bool kKeep = kRelu || (kAct && sizeof(T) == sizeof(float));  // a half would round dz
    constexpr int kSums = kAct ? kGradientVectors : 2, kInputs = kAct && !kKeep ? kGradientVectors : 2;
    const int64_t channels = call.x_channels + call.skip_channels, size = channels / call.groups;
    for (int64_t c = first; c < last; ++c) {
        const int64_t group = sample * call.groups + c / size;
        f.mean[c] = grads.mean[group] - (shift ? shift[c] : 0.0f);
        f.scale[c] = weight ? weight[c] * grads.rstd[group] : grads.rstd[group];
        f.offset[c] = bias ? bias[c] : 0.0f;
        f.plain[c] = f.centred[c] = f.shift[c] = 0.0f;
    }
    const T* grad = static_cast<const T*>(grads.grad) + sample * call.pixels * channels;
    auto each_source = [&](const auto& sweep) {
        const void* sources[2] = {call.x, call.skip};
        void* results[2] = {grads.out, grads.skip_out};
        const int64_t widths[2] = {call.x_channels, call.skip_channels};
        for (int s = 0; s < 2; ++s) {
            const int64_t start = s ? call.x_channels : 0, stop = start + widths[s];
            const int64_t begin = first > start ? first : start, end = last < stop ? last : stop;
            const int64_t at = sample * call.pixels * widths[s] + begin - start, chunk = chunk_pixels(widths[s]);
            for (int64_t p = 0; begin < end && p < call.pixels; p += chunk)
                sweep(grad + begin + p * channels, static_cast<const T*>(sources[s]) + at + p * widths[s],
                      static_cast<T*>(results[s]) + at + p * widths[s], widths[s],
                      call.pixels - p < chunk ? call.pixels - p : chunk, begin, end);
        }
    };
    // Of ReLU, which has no skip: y, and where dz goes, if not into the place of du.
    const auto made_of = [&](const T* g) {
        return kRelu ? static_cast<const T*>(static_cast<const void*>(grads.made)) +
                           (g - static_cast<const T*>(grads.grad))
                     : nullptr;
    };
    const auto kept_of = [&](const T* g, T* out) {
        if (!kRelu || grads.passed == nullptr) return out;
        return static_cast<T*>(static_cast<void*>(grads.passed)) + (g - static_cast<const T*>(grads.grad));
    };
    each_source([&](const T* g, const T* x, T* out, int64_t step, int64_t pixels, int64_t c, int64_t end) {
        each_block<GroupSums<kAct, kRelu, kKeep, T>, kSums>(end - c, g, channels, made_of(g), x, step, kept_of(g, out),
                                                            pixels, f.mean + c, f.scale + c, f.offset + c, f.plain + c,
                                                            f.centred + c);
    });
    for (int64_t g = first; g < last; g += size) {
        const double rstd = (double)grads.rstd[sample * call.groups + g / size];
        const double share = 1.0 / ((double)call.pixels * (double)size);
        double one = 0.0, two = 0.0;
        for (int64_t c = g; c < g + size; ++c) {
            one += (double)f.scale[c] * (double)f.plain[c];
            two += (double)f.scale[c] * (double)f.centred[c];
        }
        for (int64_t c = g; c < g + size; ++c) {
            f.slope[c] = (float)(-two * rstd * rstd * share);
            f.level[c] = (float)(-one * share);
            partial[c] = (float)((double)f.centred[c] * rstd);
            partial[channels + c] = f.plain[c];
        }
    }
    each_source([&](const T* g, const T* x, T* out, int64_t step, int64_t pixels, int64_t c, int64_t end) {
        each_block<GroupInputGradient<kAct, kKeep, T>, kInputs>(end - c, g, channels, x, step, kept_of(g, out), out,
                                                                pixels, f.mean + c, f.scale + c, f.offset + c,
                                                                f.slope + c, f.level + c, f.shift + c);
    });
    if (grads.grad_shift)
        for (int64_t c = first; c < last; ++c) grads.grad_shift[sample * channels + c] = f.shift[c];
}

template <class T>
static void gradient_part_of(const GroupNorm& call, const GroupNormGradient& grads, int64_t sample, int64_t first,
                             int64_t last, const float* weight, const float* bias, const float* shift,
                             const GroupFactors& f, float* partial) {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (grads.made)
            return gradient_part<false, true, T>(call, grads, sample, first, last, weight, bias, shift, f, partial);
    }
    if (call.silu)
        gradient_part<true, false, T>(call, grads, sample, first, last, weight, bias, shift, f, partial);
    else
        gradient_part<false, false, T>(call, grads, sample, first, last, weight, bias, shift, f, partial);
}

// Channels [first, last) of one sample, whole groups. scratch: 8 arrays of `room` floats; partial: this sample's terms
// of the gradients of weight and bias, [2, channels].
static void norm_gradient_of(const GroupNorm& call, const GroupNormGradient& grads, int64_t sample, int64_t first,
                             int64_t last, const float* weight, const float* bias, const float* shift, float* scratch,
                             int64_t room, float* partial) {
    float* a[8];
    for (int i = 0; i < 8; ++i) a[i] = scratch + i * room;
    const GroupFactors f = {a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]};
    if (call.dtype == Dtype::f32)
        gradient_part_of<float>(call, grads, sample, first, last, weight, bias, shift, f, partial);
    else if (call.dtype == Dtype::bf16)
        gradient_part_of<Bf16>(call, grads, sample, first, last, weight, bias, shift, f, partial);
    else
        gradient_part_of<F16>(call, grads, sample, first, last, weight, bias, shift, f, partial);
}

// sums[c] = sum over rows of from[row, c], in their order.
static void sum_rows(const float* from, int64_t rows, int64_t columns, double* sums) {
    for (int64_t c = 0; c < columns; ++c) sums[c] = 0.0;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) sums[c] += (double)from[r * columns + c];
}
