// Included once per instruction set by qkv_attention.cpp.
//
// With S = Q K^T / sqrt(d), O = P V and the rows' logsumexp L, by blocks of queries and tiles of keys (Dao,
// "FlashAttention-2", 2023, algorithm 2):
//
//   P = exp(S - L)   dV = P^T dO   dP = dO V^T   dS = P . (dP - rowsum(dO . O))
//   dQ = dS K / sqrt(d)   dK = dS^T Q / sqrt(d)
//
// S, dP and dQ have queries in the lanes, as the forward pass. dV and dK are sums over queries, so that there the d
// numbers of a key lie in the lanes and P and dS enter as scalars: nothing is transposed but a block's rows of Q, dO, O
// and dQ. Where a head has half as many numbers as a vector has lanes, two queries share it.
#include "cpu/nn/kernels/qkv_attention_kernel.h"

template <int D>
constexpr int kShare = kLanes > D ? kLanes / D : 1;  // queries whose rows lie in one vector

#if KR_LANES == 16
// Numbers 0, 2, 4, ... of a, then 1, 3, 5, ...; and the way back.
KR_FN f32v split_pairs(f32v a) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return (f32v)_mm512_permutexvar_ps(even, (__m512)a);
}
KR_FN f32v join_pairs(f32v a) {
    const __m512i halves = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    return (f32v)_mm512_permutexvar_ps(halves, (__m512)a);
}
KR_FN f32v splat_pair(const float* from) {
    double pair;
    std::memcpy(&pair, from, sizeof pair);
    return (f32v)_mm512_castpd_ps(_mm512_set1_pd(pair));
}
#else
KR_FN f32v split_pairs(f32v a) { return a; }  // no head is shorter than a vector
KR_FN f32v join_pairs(f32v a) { return a; }
KR_FN f32v splat_pair(const float* from) { return splat(*from); }
#endif

// total[j][D * kShare] += sum_q weights[j][q] rows[q][D] of `queries` rows, for n keys rounded up to a multiple of 8.
// The rows of kShare queries lie number by number, and their sums stay apart.
template <int D, int V>
KR_FN void add_weighted(const float* weights, const float* rows, int queries, int n, float* total) {
    constexpr int share = kShare<D>, width = D * share, vectors = width / kLanes;
    constexpr int sums = kLanes == 8 ? 8 : 16, most = kLanes == 8 ? 2 : 4;
    constexpr int group = vectors < most ? vectors : most, step = sums / group < 8 ? sums / group : 8;
    for (int j = 0; j < n; j += step)
        for (int c = 0; c < width; c += group * kLanes) {
            const float *w = weights + j * V * kLanes, *row = rows + c;
            float* to = total + j * width + c;
            f32v sum[step][group];
            KR_UNROLL for (int k = 0; k < step; ++k) KR_UNROLL for (int i = 0; i < group; ++i) sum[k][i] =
                load(to + k * width + i * kLanes);
            for (int q = 0; q < queries; q += share, w += share, row += width) {
                f32v a[group];
                KR_UNROLL for (int i = 0; i < group; ++i) a[i] = load(row + i * kLanes);
                KR_UNROLL for (int k = 0; k < step; ++k) {
                    const f32v p = share == 1 ? splat(w[k * V * kLanes]) : splat_pair(w + k * V * kLanes);
                    KR_UNROLL for (int i = 0; i < group; ++i) sum[k][i] = fma(p, a[i], sum[k][i]);
                }
            }
            KR_UNROLL for (int k = 0; k < step; ++k) KR_UNROLL for (int i = 0; i < group; ++i)
                store(to + k * width + i * kLanes, sum[k][i]);
        }
}

// Rows of a head, [tokens rounded up to kKeys][D] with zeros behind the last token. The rows of `shared` lie as
// add_weighted reads them, grad_k and grad_v as it writes them.
struct HeadRows {
    float *q, *k, *v, *out, *grad_out, *shared_q, *shared_grad_out, *grad_k, *grad_v;
};

// `count` queries from the t-th on: their rows of grad_q, and what they add to grad_k and grad_v.
template <int D, int V, class T>
static void attend_backward(const HeadRows& head, const float* logsumexp, int64_t tokens, int64_t t, int count,
                            T* grad_q, int64_t to_step) {
    alignas(64) float q[V * D * kLanes], grad_out[V * D * kLanes], grad[V * D * kLanes];
    alignas(64) float p[kKeys * V * kLanes], ds[kKeys * V * kLanes];
    rows_to_lanes<D, V>(head.q + t * D, count, q);
    rows_to_lanes<D, V>(head.grad_out + t * D, count, grad_out);
    rows_to_lanes<D, V>(head.out + t * D, count, grad);
    f32v lse[V], delta[V], one[V];
    KR_UNROLL for (int v = 0; v < V; ++v) {
        const int left = count - v * kLanes;
        lse[v] = load_part(logsumexp + t + v * kLanes, left < kLanes ? left : kLanes, logsumexp[t]) * splat(kLog2E);
        delta[v] = splat(0.0f), one[v] = splat(1.0f);
        for (int c = v * D; c < (v + 1) * D; ++c)
            delta[v] = fma(load(grad_out + c * kLanes), load(grad + c * kLanes), delta[v]);
    }
    for (int c = 0; c < V * D; ++c) store(grad + c * kLanes, splat(0.0f));
    const f32v scale = splat(kLog2E / __builtin_sqrtf((float)D));
    constexpr int width = D * kShare<D>;
    for (int64_t s = 0; s < tokens; s += kKeys) {
        const int n = (int)(tokens - s < kKeys ? tokens - s : kKeys), whole = (n + 7) / 8 * 8;
        tile_scores<D, V>(q, head.k + s * D, n, p);
        tile_scores<D, V>(grad_out, head.v + s * D, n, ds);
        for (int j = 0; j < whole; ++j) KR_UNROLL for (int v = 0; v < V; ++v) {
                const int at = (j * V + v) * kLanes;
                const f32v weight = vec_exp2(fma(load(p + at), scale, -lse[v]));
                store(p + at, weight);
                store(ds + at, weight * (load(ds + at) - delta[v]));
            }
        add_rows<D, V>(ds, head.k + s * D, n, one, grad);
        add_weighted<D, V>(p, head.shared_grad_out + t * D, count, n, head.grad_v + s * width);
        add_weighted<D, V>(ds, head.shared_q + t * D, count, n, head.grad_k + s * width);
    }
    lanes_to_rows<D, V>(grad, count, 1.0f / __builtin_sqrtf((float)D), grad_q, to_step);
}

template <int D, class T>
static void attend_backward_head(const T* qkv, const T* out, const T* grad_out, const float* logsumexp, int64_t tokens,
                                 int64_t heads, T* grad_qkv, float* scratch) {
    constexpr int share = kShare<D>;
    const int64_t width = heads * D, room = (tokens + kKeys - 1) / kKeys * kKeys * D;
    const auto take = [&](int64_t times) { return (scratch += times * room) - times * room; };
    const auto zeros = [&] {
        float* to = take(share);
        for (int64_t i = 0; i < share * room; i += kLanes) store(to + i, splat(0.0f));
        return to;
    };
    const auto shared = [&](float* rows) {
        if (share == 1) return rows;
        float* to = take(1);
        for (int64_t i = 0; i < tokens * D; i += kLanes) store(to + i, join_pairs(load(rows + i)));
        return to;
    };
    HeadRows head;
    head.q = take(1), head.k = take(1), head.v = take(1), head.out = take(1), head.grad_out = take(1);
    gather_rows<D, 3>(qkv, 3 * width, width, tokens, head.q, room);
    gather_rows<D, 1>(out, width, 0, tokens, head.out, room);
    gather_rows<D, 1>(grad_out, width, 0, tokens, head.grad_out, room);
    for (float* rows : {head.q, head.k, head.v, head.out, head.grad_out})
        for (int64_t i = tokens * D; i < room; ++i) rows[i] = 0.0f;
    head.shared_q = shared(head.q), head.shared_grad_out = shared(head.grad_out);
    head.grad_k = zeros(), head.grad_v = zeros();
    for (int64_t t = 0; t < tokens;) {
        const int64_t left = tokens - t;
        const bool wide = left > kLanes && kWide > 1;
        const int most = wide ? kWide * kLanes : kLanes, count = (int)(left < most ? left : most);
        (wide ? attend_backward<D, kWide, T> : attend_backward<D, 1, T>)(head, logsumexp, tokens, t, count,
                                                                         grad_qkv + t * 3 * width, 3 * width);
        t += count;
    }
    if (share > 1)
        for (float* rows : {head.grad_k, head.grad_v})
            for (int64_t r = 0; r < tokens; ++r) {
                alignas(64) float halves[kLanes];
                store(halves, split_pairs(load(rows + r * kLanes)));
                for (int c = 0; c < D; ++c) rows[r * D + c] = halves[c] + halves[D + c];
            }
    scatter_rows<D>(head.grad_k, tokens, 1.0f / __builtin_sqrtf((float)D), grad_qkv + width, 3 * width);
    scatter_rows<D>(head.grad_v, tokens, 1.0f, grad_qkv + 2 * width, 3 * width);
}

template <class T>
static void attend_backward_head_of(const QkvAttentionBackward& call, int64_t item, float* scratch) {
    const int64_t tokens = call.tokens, heads = call.heads, d = call.head_channels;
    const int64_t width = heads * d, at = item / heads * tokens * width, offset = item % heads * d;
    const T* qkv = static_cast<const T*>(call.qkv) + 3 * at + offset;
    const T* out = static_cast<const T*>(call.out) + at + offset;
    const T* grad_out = static_cast<const T*>(call.grad_out) + at + offset;
    const float* logsumexp = call.logsumexp + item * tokens;
    T* grad_qkv = static_cast<T*>(call.grad_qkv) + 3 * at + offset;
    if (d == 8) attend_backward_head<8>(qkv, out, grad_out, logsumexp, tokens, heads, grad_qkv, scratch);
    if (d == 16) attend_backward_head<16>(qkv, out, grad_out, logsumexp, tokens, heads, grad_qkv, scratch);
    if (d == 32) attend_backward_head<32>(qkv, out, grad_out, logsumexp, tokens, heads, grad_qkv, scratch);
    if (d == 64) attend_backward_head<64>(qkv, out, grad_out, logsumexp, tokens, heads, grad_qkv, scratch);
}

// scratch: 11 (tokens rounded up to 32) d floats from the start of a cache line; 7 are used where no vector is shared.
static void attention_backward_item(const QkvAttentionBackward& call, int64_t item, float* scratch) {
    if (call.dtype == Dtype::f32)
        attend_backward_head_of<float>(call, item, scratch);
    else if (call.dtype == Dtype::bf16)
        attend_backward_head_of<Bf16>(call, item, scratch);
    else
        attend_backward_head_of<F16>(call, item, scratch);
}
