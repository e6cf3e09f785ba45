// Included once per instruction set by group_norm_grad_norms.cpp.
//
// With n = (x - mean_g) rstd_g: dw_c = sum(dy n), db_c = sum(dy). Both tensors are read from memory once: in chunks of
// pixels that fit L1, the mean of a chunk and then what is about it, joined by Chan's rule, which carries
// sum(dy (x - mean_c)) from one mean to the next as it does the squares.
#include "cpu/simd/lanes_io.h"

#include "cpu/nn/kernels/column_blocks.h"

constexpr int64_t kSumsChunk = 2048;  // elements of each tensor: 16 KB of float32 together

// Of each channel, so far: mean, sum of squares about it, sum(dy), sum(dy (x - mean)). Room for a vector more.
struct ChannelSums {
    float *mean, *squares, *plain, *centred;
};

// Channels side by side: n pixels, `step` apart, joined to those of the `before` pixels so far.
template <class T>
struct AddPixels {
    template <int V>
    KR_FN void run(const T* x, const T* grad, int64_t step, int64_t n, int64_t before, const ChannelSums& to, int64_t c,
                   int live) {
        f32v own[V] = {}, one[V] = {}, square[V] = {}, two[V] = {};
        for (int64_t p = 0; p < n; ++p) {
            KR_UNROLL for (int v = 0; v < V; ++v) {
                const int64_t at = p * step + c + v * kLanes;
                own[v] = own[v] + read(x + at, live);
                one[v] = one[v] + read(grad + at, live);
            }
        }
        KR_UNROLL for (int v = 0; v < V; ++v) own[v] = own[v] * splat(1.0f / (float)n);
        for (int64_t p = 0; p < n; ++p) {
            KR_UNROLL for (int v = 0; v < V; ++v) {
                const int64_t at = p * step + c + v * kLanes;
                const f32v d = read(x + at, live) - own[v];
                square[v] = fma(d, d, square[v]);
                two[v] = fma(read(grad + at, live), d, two[v]);
            }
        }
        const float share = (float)n / (float)(before + n);
        const f32v of_new = splat(share), of_old = splat(1.0f - share), cross = splat((float)before * share);
        KR_UNROLL for (int v = 0; v < V; ++v) {
            const int64_t at = c + v * kLanes;
            const f32v mean = load(to.mean + at), plain = load(to.plain + at), d = own[v] - mean;
            write(to.squares + at, load(to.squares + at) + fma(d * d, cross, square[v]), live);
            write(to.centred + at, load(to.centred + at) + fma(d, one[v] * of_old - plain * of_new, two[v]), live);
            write(to.plain + at, plain + one[v], live);
            write(to.mean + at, fma(d, of_new, mean), live);
        }
    }
};

// One channel whose n pixels lie side by side.
template <class T>
KR_FN void add_row(const T* x, const T* grad, int64_t n, int64_t before, const ChannelSums& to, int64_t c) {
    const int64_t whole = n / kLanes * kLanes;
    const int rest = (int)(n - whole);
    f32v own = {}, one = {}, square = {}, two = {};
    for (int64_t p = 0; p < whole; p += kLanes) own = own + load_as(x + p), one = one + load_as(grad + p);
    if (rest) own = own + load_as_part(x + whole, rest), one = one + load_as_part(grad + whole, rest);
    const float centre = reduce_sum(own) / (float)n, sum = reduce_sum(one);
    for (int64_t p = 0; p < whole; p += kLanes) {
        const f32v d = load_as(x + p) - splat(centre);
        square = fma(d, d, square);
        two = fma(load_as(grad + p), d, two);
    }
    float more = 0.0f, centred = 0.0f;
    for (int64_t p = whole; p < n; ++p) {
        const float d = to_float(x[p]) - centre;
        more += d * d;
        centred += to_float(grad[p]) * d;
    }
    const float share = (float)n / (float)(before + n), d = centre - to.mean[c];
    to.squares[c] += reduce_sum(square) + more + d * d * ((float)before * share);
    to.centred[c] += reduce_sum(two) + centred + d * (sum * (1.0f - share) - to.plain[c] * share);
    to.plain[c] += sum;
    to.mean[c] += d * share;
}

// Channels [first, last) of one image, whose first element of each tensor is given.
template <class T>
static void image_sums(const GroupNormGradNorms& call, const T* x, const T* grad, int64_t first, int64_t last,
                       const ChannelSums& to) {
    for (int64_t c = first; c < last; ++c) to.mean[c] = to.squares[c] = to.plain[c] = to.centred[c] = 0.0f;
    if (!call.channels_last) {
        for (int64_t c = first; c < last; ++c)
            for (int64_t p = 0; p < call.pixels; p += kSumsChunk)
                add_row(x + c * call.pixels + p, grad + c * call.pixels + p,
                        call.pixels - p < kSumsChunk ? call.pixels - p : kSumsChunk, p, to, c);
        return;
    }
    int64_t chunk = kSumsChunk / call.channels;  // by the whole row, so that sums do not depend on how it is cut
    if (chunk < 16) chunk = 16;
    const ChannelSums from_first = {to.mean + first, to.squares + first, to.plain + first, to.centred + first};
    for (int64_t p = 0; p < call.pixels; p += chunk) {
        const int64_t at = p * call.channels + first, n = call.pixels - p < chunk ? call.pixels - p : chunk;
        each_block<AddPixels<T>, 4>(last - first, x + at, grad + at, call.channels, n, p, from_first);
    }
}

template <class T>
static void record_sums(const GroupNormGradNorms& call, int64_t record, int64_t first, int64_t last,
                        const ChannelSums& to, double* weight, double* bias) {
    const int64_t size = call.channels / call.groups, image = call.channels * call.pixels;
    for (int64_t c = first; c < last; ++c) weight[c] = bias[c] = 0.0;
    for (int64_t row = record * call.rows; row < (record + 1) * call.rows; ++row) {
        image_sums(call, static_cast<const T*>(call.x) + row * image, static_cast<const T*>(call.grad) + row * image,
                   first, last, to);
        for (int64_t g = first; g < last; g += size) {
            double centre = 0.0, spread = 0.0;
            for (int64_t c = g; c < g + size; ++c) centre += (double)to.mean[c];
            centre /= (double)size;
            for (int64_t c = g; c < g + size; ++c) {
                const double d = (double)to.mean[c] - centre;
                spread += (double)to.squares[c] + (double)call.pixels * d * d;
            }
            const double count = (double)call.pixels * (double)size;
            const double rstd = 1.0 / __builtin_sqrt(spread / count + (double)call.eps);
            for (int64_t c = g; c < g + size; ++c) {
                const double d = (double)to.mean[c] - centre, plain = (double)to.plain[c];
                weight[c] += rstd * ((double)to.centred[c] + d * plain);
                bias[c] += plain;
            }
        }
    }
}

// Channels [first, last) of a record, whole groups: their gradients, and of each group the sum of squares.
static void group_norm_record(const GroupNormGradNorms& call, int64_t record, int64_t first, int64_t last,
                              float* scratch, int64_t room, double* gradients, double* squares) {
    const ChannelSums to = {scratch, scratch + room, scratch + 2 * room, scratch + 3 * room};
    double *weight = gradients, *bias = gradients + call.channels;
    if (call.dtype == Dtype::f32)
        record_sums<float>(call, record, first, last, to, weight, bias);
    else if (call.dtype == Dtype::bf16)
        record_sums<Bf16>(call, record, first, last, to, weight, bias);
    else
        record_sums<F16>(call, record, first, last, to, weight, bias);
    const int64_t size = call.channels / call.groups;
    for (int64_t g = first / size; g < last / size; ++g) {
        squares[g] = 0.0;
        for (int64_t c = g * size; c < (g + 1) * size; ++c) squares[g] += weight[c] * weight[c] + bias[c] * bias[c];
    }
    for (int64_t c = first; call.weight && c < last; ++c) {
        call.weight[record * call.channels + c] = (float)weight[c];
        call.bias[record * call.channels + c] = (float)bias[c];
    }
}
