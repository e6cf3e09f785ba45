// Included once per instruction set by batch_norm_act.cpp.
//
// Two sweeps over lines of whole vectors, a few columns at a time: sums of each column of a chunk, then, with the sums
// of all chunks merged in double in their order, the result. Moments of a chunk are its rounded mean, and the sums of
// differences from it and of their squares: its mean is then known to more digits than a float has.
#include "cpu/simd/lanes_io.h"

#include "cpu/nn/kernels/column_blocks.h"
#include "cpu/nn/kernels/positive_bits.h"

constexpr int64_t kChunk = 4096;                       // numbers: 16 KB of float32
constexpr int64_t kFewestLines = 16, kMostLines = 64;  // so that merging costs little, and for the error of their sum

static int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

static NormLines norm_lines(int64_t rows, int64_t channels) {
    NormLines cut;
    cut.channels = cut.width = channels;
    // Columns of 4 vectors and 16 numbers at least, for as many sums side by side. Where whole vectors would need too
    // many rows, a line is a row and its last vector a part of one.
    const int64_t whole = channels / common_divisor(channels, kLanes) * kLanes;
    if (whole <= 1024) cut.width = ((kLanes == 1 ? 16 : 4 * kLanes) + whole - 1) / whole * whole;
    cut.room = (cut.width + kLanes - 1) / kLanes * kLanes;
    cut.lines = rows * channels / cut.width;
    cut.rest = rows * channels - cut.lines * cut.width;
    cut.chunk_lines = kChunk / cut.width;
    if (cut.chunk_lines < kFewestLines) cut.chunk_lines = kFewestLines;
    if (cut.chunk_lines > kMostLines) cut.chunk_lines = kMostLines;
    cut.chunks = (cut.lines + cut.chunk_lines - 1) / cut.chunk_lines + (cut.rest > 0);
    return cut;
}

constexpr int kSumVectors = 4, kWideVectors = KR_LANES == 16 ? 4 : 2;  // that leave registers for the factors

template <class T>
struct Moments {
    template <int V>
    KR_FN void run(const T* from, int64_t step, int64_t lines, float* mean, float* firsts, float* squares, int64_t c,
                   int live) {
        f32v sum[V] = {}, first[V] = {}, square[V] = {};
        for (int64_t p = 0; p < lines; ++p)
            KR_UNROLL for (int v = 0; v < V; ++v) sum[v] = sum[v] + read(from + p * step + c + v * kLanes, live);
        const f32v share = splat(1.0f / (float)lines);
        KR_UNROLL for (int v = 0; v < V; ++v) sum[v] = sum[v] * share;
        for (int64_t p = 0; p < lines; ++p) {
            KR_UNROLL for (int v = 0; v < V; ++v) {
                const f32v d = read(from + p * step + c + v * kLanes, live) - sum[v];
                first[v] = first[v] + d;
                square[v] = fma(d, d, square[v]);
            }
        }
        KR_UNROLL for (int v = 0; v < V; ++v) {
            store(mean + c + v * kLanes, sum[v]);
            store(firsts + c + v * kLanes, first[v]);
            store(squares + c + v * kLanes, square[v]);
        }
    }
};

template <bool kRelu, bool kResidual, bool kBits, class T>
struct Apply {
    template <int V>
    KR_FN void run(const T* x, const T* residual, T* y, uint8_t* bits, int64_t step, int64_t lines, const float* mean,
                   const float* scale, const float* offset, int64_t c, int live) {
        f32v m[V], a[V], b[V];
        KR_UNROLL for (int v = 0; v < V; ++v) {
            const int64_t at = c + v * kLanes;
            m[v] = load(mean + at), a[v] = load(scale + at), b[v] = load(offset + at);
        }
        for (int64_t p = 0; p < lines; ++p) {
            KR_UNROLL for (int v = 0; v < V; ++v) {
                const int64_t at = p * step + c + v * kLanes;
                f32v out = fma(read(x + at, live) - m[v], a[v], b[v]);
                if (kResidual) out = out + read(residual + at, live);
                if (kBits) write_bits(bits, at, out);
                if (kRelu) out = max(splat(0.0f), out);  // its second operand where that is NaN
                write(y + at, out, live);
            }
        }
    }
};

// Where the sign of what stood before the ReLU comes from.
enum class Mask { none, from_y, from_x, from_bits };

template <Mask kMask>
KR_FN f32v masked(f32v grad, f32v y) {
    return kMask == Mask::none || kMask == Mask::from_bits ? grad : y <= splat(0.0f) ? splat(0.0f) : grad;
}

template <Mask kMask, bool kPass, class T>
struct Sums {
    template <int V>
    KR_FN void run(const T* grad, const T* x, const T* y, const uint8_t* bits, T* passed, int64_t step, int64_t lines,
                   const float* mean, const float* scale, const float* offset, float* plain, float* centred, int64_t c,
                   int live) {
        f32v one[V] = {}, two[V] = {}, m[V], a[V], b[V];
        KR_UNROLL for (int v = 0; v < V; ++v) {
            const int64_t at = c + v * kLanes;
            m[v] = load(mean + at), a[v] = load(scale + at), b[v] = load(offset + at);
        }
        for (int64_t p = 0; p < lines; ++p) {
            KR_UNROLL for (int v = 0; v < V; ++v) {
                const int64_t at = p * step + c + v * kLanes;
                const f32v d = read(x + at, live) - m[v];
                const f32v out = kMask == Mask::from_y   ? read(y + at, live)
                                 : kMask == Mask::from_x ? fma(d, a[v], b[v])
                                                         : d;
                f32v g = masked<kMask>(read(grad + at, live), out);
                if (kMask == Mask::from_bits) g = where_bits(bits, at, g);
                if (kPass) write(passed + at, g, live);
                one[v] = one[v] + g;
                two[v] = fma(g, d, two[v]);
            }
        }
        KR_UNROLL for (int v = 0; v < V; ++v) {
            store(plain + c + v * kLanes, one[v]);
            store(centred + c + v * kLanes, two[v]);
        }
    }
};

template <Mask kMask, class T>
struct InputGradient {
    template <int V>
    KR_FN void run(const T* grad, const T* x, const T* y, const uint8_t* bits, T* out, int64_t step, int64_t lines,
                   const float* mean, const float* scale, const float* offset, const float* slope, const float* level,
                   int64_t c, int live) {
        f32v m[V], a[V], b[V], s[V], l[V];
        KR_UNROLL for (int v = 0; v < V; ++v) {
            const int64_t at = c + v * kLanes;
            m[v] = load(mean + at), a[v] = load(scale + at), b[v] = load(offset + at);
            s[v] = load(slope + at), l[v] = load(level + at);
        }
        for (int64_t p = 0; p < lines; ++p) {
            KR_UNROLL for (int v = 0; v < V; ++v) {
                const int64_t at = p * step + c + v * kLanes;
                const f32v d = read(x + at, live) - m[v];
                const f32v before = kMask == Mask::from_y   ? read(y + at, live)
                                    : kMask == Mask::from_x ? fma(d, a[v], b[v])
                                                            : d;
                f32v g = masked<kMask>(read(grad + at, live), before);
                if (kMask == Mask::from_bits) g = where_bits(bits, at, g);
                write(out + at, fma(g, a[v], fma(d, s[v], l[v])), live);
            }
        }
    }
};

// ---------------------------------------------------------------- what chunks add up to

// The columns of a line by channel, in place: the first `channels` sums.
static void fold(const NormLines& cut, double* sums) {
    for (int64_t row = cut.channels; row < cut.width; row += cut.channels)
        for (int64_t c = 0; c < cut.channels; ++c) sums[c] += sums[row + c];
}

// A number of each channel, repeated for the columns of a line.
static void repeat(const NormLines& cut, float* factor) {
    for (int64_t c = cut.channels; c < cut.width; ++c) factor[c] = factor[c - cut.channels];
}

// Every chunk of all groups, and its number among the partial sums.
template <class F>
static void each_chunk(const NormGroups& groups, const F& each) {
    for (int64_t group = 0; group < groups.count; ++group) {
        const NormLines& cut = group + 1 < groups.count ? groups.each : groups.last;
        for (int64_t i = 0; i < cut.chunks; ++i) each(norm_chunk(cut, i), group * groups.each.chunks + i);
    }
}

// Mean, scale and offset of y = scale (x - mean) + offset, [3, room]. Forward and backward must agree to the bit.
template <class Call>
static void affine(const Call& call, const NormLines& cut, float* factors) {
    float *mean = factors, *scale = mean + cut.room, *offset = scale + cut.room;
    for (int64_t c = 0; c < cut.channels; ++c) {
        const float rstd = (float)(1.0 / __builtin_sqrt((double)call.var[c] + (double)call.eps));
        mean[c] = call.mean[c];
        scale[c] = call.weight ? call.weight[c] * rstd : rstd;
        offset[c] = call.bias ? call.bias[c] : 0.0f;
    }
    repeat(cut, mean), repeat(cut, scale), repeat(cut, offset);
}

static void norm_factors(const BatchNormActGradient& call, const NormLines& cut, float* factors) {
    affine(call, cut, factors);
}

static void norm_merge_moments(const BatchNormAct& call, const NormGroups& groups, const float* partial, double* sums,
                               float* factors) {
    const NormLines& cut = groups.each;
    const int64_t rows = call.rows;
    double* squares = sums + cut.room;
    for (int64_t c = 0; c < cut.width; ++c) sums[c] = squares[c] = 0.0;
    each_chunk(groups, [&](const NormChunk& chunk, int64_t i) {
        const float *mean = partial + kMoments * cut.room * i, *first = mean + cut.room;
        const double lines = (double)chunk.lines;
        for (int64_t c = 0; c < chunk.width; ++c) sums[c] += lines * (double)mean[c] + (double)first[c];
    });
    fold(cut, sums);
    for (int64_t c = 0; c < cut.channels; ++c) sums[c] /= (double)rows;
    for (int64_t c = cut.channels; c < cut.width; ++c) sums[c] = sums[c - cut.channels];
    each_chunk(groups, [&](const NormChunk& chunk, int64_t i) {
        const float *mean = partial + kMoments * cut.room * i, *first = mean + cut.room, *square = first + cut.room;
        const double lines = (double)chunk.lines;
        for (int64_t c = 0; c < chunk.width; ++c) {
            const double d = (double)mean[c] - sums[c];  // sum (x - m + d)^2
            squares[c] += (double)square[c] + d * (2.0 * (double)first[c] + lines * d);
        }
    });
    fold(cut, squares);
    for (int64_t c = 0; c < cut.channels; ++c) {
        call.mean[c] = (float)sums[c];
        call.var[c] = (float)(squares[c] / (double)rows);
    }
    affine(call, cut, factors);
}

// Of w r (g - mean(g) - n mean(g n)) with n = (x - mean) r as scale g + slope (x - mean) + level: [5, room].
static void norm_merge_sums(const BatchNormActGradient& call, const NormGroups& groups, const float* partial,
                            double* sums, float* factors) {
    const NormLines& cut = groups.each;
    double* centred = sums + cut.room;
    for (int64_t c = 0; c < cut.width; ++c) sums[c] = centred[c] = 0.0;
    each_chunk(groups, [&](const NormChunk& chunk, int64_t i) {
        const float *one = partial + kSums * cut.room * i, *two = one + cut.room;
        for (int64_t c = 0; c < chunk.width; ++c) sums[c] += (double)one[c], centred[c] += (double)two[c];
    });
    fold(cut, sums), fold(cut, centred);
    affine(call, cut, factors);
    const float* scale = factors + cut.room;
    float *slope = factors + 3 * cut.room, *level = slope + cut.room;
    for (int64_t c = 0; c < cut.channels; ++c) {
        const double variance = (double)call.var[c] + (double)call.eps, share = (double)scale[c] / (double)call.rows;
        call.grad_weight[c] = (float)(centred[c] / __builtin_sqrt(variance));
        call.grad_bias[c] = (float)sums[c];
        slope[c] = (float)(-share * centred[c] / variance);
        level[c] = (float)(-share * sums[c]);
    }
    repeat(cut, slope), repeat(cut, level);
}

// ---------------------------------------------------------------- chunks of each element type

template <class T>
static void moments_of(const BatchNormAct& call, const NormLines& cut, const NormChunk& chunk, float* partial) {
    const T* x = static_cast<const T*>(call.x) + chunk.offset;
    each_block<Moments<T>, kSumVectors>(chunk.width, x, cut.width, chunk.lines, partial, partial + cut.room,
                                        partial + 2 * cut.room);
}

template <class T>
static void apply_to(const BatchNormAct& call, const NormLines& cut, const NormChunk& chunk, const float* factors) {
    const T* x = static_cast<const T*>(call.x) + chunk.offset;
    const T* residual = call.residual ? static_cast<const T*>(call.residual) + chunk.offset : nullptr;
    T* y = static_cast<T*>(call.y) + chunk.offset;
    const float *scale = factors + cut.room, *offset = scale + cut.room;
    uint8_t* bits = call.positive ? call.positive + chunk.offset / 8 : nullptr;
#define KR_APPLY(relu, more, bit)                                                                                  \
    each_block<Apply<relu, more, bit, T>, kWideVectors>(chunk.width, x, residual, y, bits, cut.width, chunk.lines, \
                                                        factors, scale, offset)
    if (bits) {
        KR_APPLY(true, true, true);
    } else if (call.relu) {
        if (residual)
            KR_APPLY(true, true, false);
        else
            KR_APPLY(true, false, false);
    } else {
        if (residual)
            KR_APPLY(false, true, false);
        else
            KR_APPLY(false, false, false);
    }
#undef KR_APPLY
}

template <class T>
static void sums_of(const BatchNormActGradient& call, const NormLines& cut, const NormChunk& chunk,
                    const float* factors, float* partial) {
    const T *grad = static_cast<const T*>(call.grad) + chunk.offset, *x = static_cast<const T*>(call.x) + chunk.offset;
    const T* y = call.y ? static_cast<const T*>(call.y) + chunk.offset : nullptr;
    T* passed = call.passed ? static_cast<T*>(call.passed) + chunk.offset : nullptr;
    const float *scale = factors + cut.room, *offset = scale + cut.room;
    const uint8_t* bits = call.positive ? call.positive + chunk.offset / 8 : nullptr;
#define KR_SUMS(mask, pass)                                                                                      \
    each_block<Sums<mask, pass, T>, kWideVectors>(chunk.width, grad, x, y, bits, passed, cut.width, chunk.lines, \
                                                  factors, scale, offset, partial, partial + cut.room)
    if (bits)
        KR_SUMS(Mask::from_bits, false);
    else if (!call.relu)
        KR_SUMS(Mask::none, false);
    else if (!y)
        KR_SUMS(Mask::from_x, false);
    else if (!passed)
        KR_SUMS(Mask::from_y, false);
    else
        KR_SUMS(Mask::from_y, true);
#undef KR_SUMS
}

template <class T>
static void input_gradient_of(const BatchNormActGradient& call, const NormLines& cut, const NormChunk& chunk,
                              const float* factors) {
    const T* grad = static_cast<const T*>(call.passed ? call.passed : call.grad) + chunk.offset;
    const T* x = static_cast<const T*>(call.x) + chunk.offset;
    const T* y = call.y ? static_cast<const T*>(call.y) + chunk.offset : nullptr;
    T* out = static_cast<T*>(call.out) + chunk.offset;
    const float *scale = factors + cut.room, *offset = scale + cut.room, *slope = offset + cut.room;
    const uint8_t* bits = call.positive ? call.positive + chunk.offset / 8 : nullptr;
#define KR_GRADIENT(mask)                                                                                        \
    each_block<InputGradient<mask, T>, kWideVectors>(chunk.width, grad, x, y, bits, out, cut.width, chunk.lines, \
                                                     factors, scale, offset, slope, slope + cut.room)
    if (bits)
        KR_GRADIENT(Mask::from_bits);
    else if (!call.relu || call.passed)
        KR_GRADIENT(Mask::none);
    else if (!y)
        KR_GRADIENT(Mask::from_x);
    else
        KR_GRADIENT(Mask::from_y);
#undef KR_GRADIENT
}

#define KR_EACH_DTYPE(function, ...)    \
    if (call.dtype == Dtype::f32)       \
        function<float>(__VA_ARGS__);   \
    else if (call.dtype == Dtype::bf16) \
        function<Bf16>(__VA_ARGS__);    \
    else                                \
        function<F16>(__VA_ARGS__)

static void norm_moments(const BatchNormAct& call, const NormLines& cut, const NormChunk& chunk, float* partial) {
    KR_EACH_DTYPE(moments_of, call, cut, chunk, partial);
}
static void norm_apply(const BatchNormAct& call, const NormLines& cut, const NormChunk& chunk, const float* factors) {
    KR_EACH_DTYPE(apply_to, call, cut, chunk, factors);
}
static void norm_sums(const BatchNormActGradient& call, const NormLines& cut, const NormChunk& chunk,
                      const float* factors, float* partial) {
    KR_EACH_DTYPE(sums_of, call, cut, chunk, factors, partial);
}
static void norm_input_gradient(const BatchNormActGradient& call, const NormLines& cut, const NormChunk& chunk,
                                const float* factors) {
    KR_EACH_DTYPE(input_gradient_of, call, cut, chunk, factors);
}
#undef KR_EACH_DTYPE

// out = grad where its bit is set, else 0; a multiple of 16 numbers.
static void norm_masked(const float* grad, const uint8_t* bits, int64_t count, float* out) {
    for (int64_t at = 0; at < count; at += kLanes) store(out + at, where_bits(bits, at, load(grad + at)));
}
