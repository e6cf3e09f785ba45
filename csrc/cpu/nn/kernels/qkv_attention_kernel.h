// Included once per instruction set by qkv_attention.cpp, by way of qkv_attention_backward_kernel.h.
//
// A lane holds one number of a query, and kLanes or twice as many queries are taken together. Keys and values of a
// head, copied once to rows of d floats that L1 or L2 keeps, enter as scalars: no reduction across lanes, no tail in d,
// and no padding of heads of 8 to what a matrix product wants. The softmax is taken over tiles of keys (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018).
#include "cpu/simd/row_io.h"
#include "cpu/simd/vec_math.h"

constexpr int kKeys = 32;                   // of a tile: its scores stay in L1
constexpr int kWide = kLanes == 1 ? 1 : 2;  // vectors of queries, where there are enough: a scalar is loaded for both
// Keys, or numbers of a value, at a time, for V vectors: enough sums to hide the latency of an fma, and registers for
// them.
template <int V>
constexpr int kStep = kLanes == 8 ? 8 / V : 8;

// scores[j][V * kLanes] = q . key_j of n keys, rounded up to a multiple of 8; q is [V][D][kLanes].
template <int D, int V>
KR_FN void tile_scores(const float* q, const float* keys, int n, float* scores) {
    constexpr int step = kStep<V>;
    for (int j = 0; j < n; j += step) {
        f32v sum[step][V] = {};
        for (int c = 0; c < D; ++c) {
            f32v a[V];
            KR_UNROLL for (int v = 0; v < V; ++v) a[v] = load(q + (v * D + c) * kLanes);
            KR_UNROLL for (int k = 0; k < step; ++k) {
                const f32v key = splat(keys[(j + k) * D + c]);
                KR_UNROLL for (int v = 0; v < V; ++v) sum[k][v] = fma(a[v], key, sum[k][v]);
            }
        }
        KR_UNROLL for (int k = 0; k < step; ++k) KR_UNROLL for (int v = 0; v < V; ++v)
            store(scores + ((j + k) * V + v) * kLanes, sum[k][v]);
    }
}

// total[V][D][kLanes] = total * old + sum_j weights[j][V * kLanes] rows[j][D], of n rows.
template <int D, int V>
KR_FN void add_rows(const float* weights, const float* rows, int n, const f32v* old, float* total) {
    constexpr int step = kStep<V>;
    for (int c = 0; c < D; c += step) {
        f32v sum[step][V];
        KR_UNROLL for (int k = 0; k < step; ++k) KR_UNROLL for (int v = 0; v < V; ++v) sum[k][v] =
            load(total + (v * D + c + k) * kLanes) * old[v];
        for (int j = 0; j < n; ++j) {
            f32v p[V];
            KR_UNROLL for (int v = 0; v < V; ++v) p[v] = load(weights + (j * V + v) * kLanes);
            KR_UNROLL for (int k = 0; k < step; ++k) {
                const f32v a = splat(rows[j * D + c + k]);
                KR_UNROLL for (int v = 0; v < V; ++v) sum[k][v] = fma(p[v], a, sum[k][v]);
            }
        }
        KR_UNROLL for (int k = 0; k < step; ++k) KR_UNROLL for (int v = 0; v < V; ++v)
            store(total + (v * D + c + k) * kLanes, sum[k][v]);
    }
}

// Rows of D numbers, `step` apart, as adjacent rows of floats; P parts of a token, `width` apart, to tables `room`
// apart. The parts are read together because they share pages.
template <int D, int P, class T>
KR_FN void gather_rows(const T* from, int64_t step, int64_t width, int64_t rows, float* to, int64_t room) {
    for (int64_t r = 0; r < rows; ++r) KR_UNROLL for (int p = 0; p < P; ++p) {
            const T* row = from + r * step + p * width;
            float* into = to + p * room + r * D;
            int c = 0;
            for (; c + kLanes <= D; c += kLanes) store(into + c, load_as(row + c));
            for (; c < D; ++c) into[c] = to_float(row[c]);  // half a vector of AVX-512
        }
}

// The way back, times `scale`.
template <int D, class T>
KR_FN void scatter_rows(const float* from, int64_t rows, float scale, T* to, int64_t step) {
    for (int64_t r = 0; r < rows; ++r) {
        int c = 0;
        for (; c + kLanes <= D; c += kLanes) store_as(to + r * step + c, load(from + r * D + c) * splat(scale));
        for (; c < D; ++c) from_float(to + r * step + c, from[r * D + c] * scale);
    }
}

// `count` of V * kLanes rows of D floats as [V][D][kLanes]; the first row stands for those that are missing.
template <int D, int V>
KR_FN void rows_to_lanes(const float* rows, int count, float* lanes) {
    for (int v = 0; v < V; ++v) {
        const float* from[kLanes];
        for (int r = 0; r < kLanes; ++r) from[r] = rows + (v * kLanes + r < count ? v * kLanes + r : 0) * D;
        load_lanes(from, D, lanes + v * D * kLanes);
    }
}

// The way back, times `scale`, to rows `step` apart.
template <int D, int V, class T>
KR_FN void lanes_to_rows(const float* lanes, int count, float scale, T* to, int64_t step) {
    alignas(64) float rows[kLanes * D];
    for (int v = 0; v * kLanes < count; ++v) {
        const float* from = lanes + v * D * kLanes;
#if KR_LANES == 1
        for (int c = 0; c < D; ++c) rows[c] = from[c];
#else
        float* into[kLanes];
        for (int r = 0; r < kLanes; ++r) into[r] = rows + r * D;
        transpose_out(from, D, into, kLanes);
#endif
        const int left = count - v * kLanes;
        scatter_rows<D>(rows, left < kLanes ? left : kLanes, scale, to + v * kLanes * step, step);
    }
}

// `count` queries of one head, from rows [count][D]; keys and values are [tokens rounded up to kKeys][D].
template <int D, int V, class T>
static void attend(const float* queries, const float* keys, const float* values, int64_t tokens, int count, T* to,
                   int64_t to_step, float* logsumexp) {
    alignas(64) float q[V * D * kLanes], out[V * D * kLanes], scores[kKeys * V * kLanes];
    const f32v scale = splat(kLog2E / __builtin_sqrtf((float)D));
    rows_to_lanes<D, V>(queries, count, q);
    f32v top[V], total[V], old[V];
    KR_UNROLL for (int v = 0; v < V; ++v) top[v] = splat(-__builtin_inff()), total[v] = splat(0.0f);
    for (int c = 0; c < V * D; ++c) store(out + c * kLanes, splat(0.0f));
    for (int64_t s = 0; s < tokens; s += kKeys) {
        const int n = (int)(tokens - s < kKeys ? tokens - s : kKeys);
        tile_scores<D, V>(q, keys + s * D, n, scores);
        f32v next[V], sum[V];
        KR_UNROLL for (int v = 0; v < V; ++v) next[v] = top[v], sum[v] = splat(0.0f);
        for (int j = 0; j < n; ++j)
            KR_UNROLL for (int v = 0; v < V; ++v) next[v] = max(next[v], load(scores + (j * V + v) * kLanes));
        KR_UNROLL for (int v = 0; v < V; ++v) old[v] = vec_exp_scaled(top[v] - next[v], scale), top[v] = next[v];
        for (int j = 0; j < n; ++j) KR_UNROLL for (int v = 0; v < V; ++v) {
                float* score = scores + (j * V + v) * kLanes;
                const f32v p = vec_exp_scaled(load(score) - next[v], scale);
                sum[v] = sum[v] + p;
                store(score, p);
            }
        KR_UNROLL for (int v = 0; v < V; ++v) total[v] = fma(total[v], old[v], sum[v]);
        add_rows<D, V>(scores, values + s * D, n, old, out);
    }
    for (int v = 0; v < V; ++v) {
        const f32v share = splat(1.0f) / total[v];
        float* column = out + v * D * kLanes;
        for (int c = 0; c < D; ++c) store(column + c * kLanes, load(column + c * kLanes) * share);
        const int left = count - v * kLanes;
        if (logsumexp != nullptr && left > 0) {
            const f32v sum = fma(top[v], splat(1.0f / __builtin_sqrtf((float)D)), vec_log(total[v]));
            store_part(logsumexp + v * kLanes, sum, left < kLanes ? left : kLanes);
        }
    }
    lanes_to_rows<D, V>(out, count, 1.0f, to, to_step);
}

template <int D, class T>
static void attend_head(const T* qkv, int64_t tokens, int64_t heads, T* out, float* logsumexp, float* scratch) {
    const int64_t width = heads * D, step = 3 * width, room = (tokens + kKeys - 1) / kKeys * kKeys;
    float *queries = scratch, *keys = queries + room * D, *values = keys + room * D;
    gather_rows<D, 3>(qkv, step, width, tokens, queries, room * D);
    for (int64_t i = tokens * D; i < room * D; ++i) keys[i] = 0.0f;
    for (int64_t t = 0; t < tokens;) {
        const int64_t left = tokens - t;
        const bool wide = left > kLanes && kWide > 1;
        const int most = wide ? kWide * kLanes : kLanes, count = (int)(left < most ? left : most);
        float* sums = logsumexp == nullptr ? nullptr : logsumexp + t;
        (wide ? attend<D, kWide, T> : attend<D, 1, T>)(queries + t * D, keys, values, tokens, count, out + t * width,
                                                       width, sums);
        t += count;
    }
}

template <class T>
static void attend_head_of(const QkvAttention& call, int64_t item, float* scratch) {
    const int64_t tokens = call.tokens, heads = call.heads, d = call.head_channels;
    const int64_t image = item / heads, head = item % heads, width = heads * d;
    const T* from = static_cast<const T*>(call.qkv) + image * tokens * 3 * width + head * d;
    T* to = static_cast<T*>(call.out) + image * tokens * width + head * d;
    float* logsumexp = call.logsumexp == nullptr ? nullptr : call.logsumexp + item * tokens;
    if (d == 8) attend_head<8>(from, tokens, heads, to, logsumexp, scratch);
    if (d == 16) attend_head<16>(from, tokens, heads, to, logsumexp, scratch);
    if (d == 32) attend_head<32>(from, tokens, heads, to, logsumexp, scratch);
    if (d == 64) attend_head<64>(from, tokens, heads, to, logsumexp, scratch);
}

// scratch: 3 (tokens rounded up to 32) d floats.
static void attention_item(const QkvAttention& call, int64_t item, float* scratch) {
    if (call.dtype == Dtype::f32)
        attend_head_of<float>(call, item, scratch);
    else if (call.dtype == Dtype::bf16)
        attend_head_of<Bf16>(call, item, scratch);
    else
        attend_head_of<F16>(call, item, scratch);
}
