// Included once per instruction set by qkv_attention.cpp.
//
// A vector holds one number of kLanes queries. Keys and values of a head, copied once to rows of d floats that L1 or L2
// keeps, enter as scalars: no reduction across lanes, no tail in d, and no padding of heads of 8 to what a matrix
// product wants. The softmax is taken over tiles of keys (Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018).
#include "cpu/simd/row_io.h"
#include "cpu/simd/vec_math.h"

constexpr int kKeys = 32;  // of a tile: its scores stay in L1
constexpr int kStep = 8;   // keys, or numbers of a value, at a time: enough sums to hide the latency of an fma

// scores[j] = q . key_j for kKeys keys.
template <int D>
KR_FN void tile_scores(const float* q, const float* keys, float* scores) {
    for (int j = 0; j < kKeys; j += kStep) {
        f32v sum[kStep] = {};
        for (int c = 0; c < D; ++c) {
            const f32v a = load(q + c * kLanes);
            KR_UNROLL for (int k = 0; k < kStep; ++k) sum[k] = fma(a, splat(keys[(j + k) * D + c]), sum[k]);
        }
        KR_UNROLL for (int k = 0; k < kStep; ++k) store(scores + (j + k) * kLanes, sum[k]);
    }
}

// kLanes queries of one head; q and out are [D][kLanes], keys and values [tokens rounded up to kKeys][D].
template <int D>
KR_FN void attend(const float* q, const float* keys, const float* values, int64_t tokens, f32v scale, float* out) {
    alignas(64) float scores[kKeys * kLanes];
    f32v top = splat(-__builtin_inff()), total = splat(0.0f);
    for (int c = 0; c < D; ++c) store(out + c * kLanes, splat(0.0f));
    for (int64_t s = 0; s < tokens; s += kKeys) {
        const int n = (int)(tokens - s < kKeys ? tokens - s : kKeys);
        tile_scores<D>(q, keys + s * D, scores);
        f32v next = top;
        for (int j = 0; j < n; ++j) next = max(next, load(scores + j * kLanes));
        const f32v old = vec_exp_scaled(top - next, scale);
        top = next;
        f32v sum = splat(0.0f);
        for (int j = 0; j < n; ++j) {
            const f32v p = vec_exp_scaled(load(scores + j * kLanes) - top, scale);
            sum = sum + p;
            store(scores + j * kLanes, p);
        }
        total = fma(total, old, sum);
        for (int c = 0; c < D; c += kStep) {
            f32v acc[kStep];
            KR_UNROLL for (int k = 0; k < kStep; ++k) acc[k] = load(out + (c + k) * kLanes) * old;
            for (int j = 0; j < n; ++j) {
                const f32v p = load(scores + j * kLanes);
                KR_UNROLL for (int k = 0; k < kStep; ++k) acc[k] = fma(p, splat(values[(s + j) * D + c + k]), acc[k]);
            }
            KR_UNROLL for (int k = 0; k < kStep; ++k) store(out + (c + k) * kLanes, acc[k]);
        }
    }
    const f32v share = splat(1.0f) / total;
    for (int c = 0; c < D; ++c) store(out + c * kLanes, load(out + c * kLanes) * share);
}

// D numbers of each of the rows `step` apart, as adjacent rows of floats.
template <int D, class T>
KR_FN void gather_rows(const T* from, int64_t step, int64_t rows, float* to) {
    for (int64_t r = 0; r < rows; ++r) {
        int c = 0;
        for (; c + kLanes <= D; c += kLanes) store(to + r * D + c, load_as(from + r * step + c));
        for (; c < D; ++c) to[r * D + c] = to_float(from[r * step + c]);  // half a vector of AVX-512
    }
}

template <int D, class T>
static void attend_head(const T* qkv, int64_t tokens, int64_t heads, T* out, float* scratch) {
    const int64_t width = heads * D, step = 3 * width, room = (tokens + kKeys - 1) / kKeys * kKeys;
    float *queries = scratch, *keys = queries + room * D, *values = keys + room * D;
    gather_rows<D>(qkv, step, tokens, queries);
    gather_rows<D>(qkv + width, step, tokens, keys);
    gather_rows<D>(qkv + 2 * width, step, tokens, values);
    for (int64_t i = tokens * D; i < room * D; ++i) keys[i] = 0.0f;
    alignas(64) float q[D * kLanes], sum[D * kLanes], rows_out[D * kLanes];
    const f32v scale = splat(kLog2E / __builtin_sqrtf((float)D));
    for (int64_t t = 0; t < tokens; t += kLanes) {
        const int count = (int)(tokens - t < kLanes ? tokens - t : kLanes);
        const float* rows[kLanes];
        float* to[kLanes];
        for (int r = 0; r < kLanes; ++r) {
            rows[r] = queries + (t + (r < count ? r : 0)) * D;
            to[r] = rows_out + r * D;
        }
        load_lanes(rows, D, q);
        attend<D>(q, keys, values, tokens, scale, sum);
#if KR_LANES == 1
        for (int c = 0; c < D; ++c) rows_out[c] = sum[c];
#else
        transpose_out(sum, D, to, kLanes);
#endif
        for (int r = 0; r < count; ++r) {
            T* row = out + (t + r) * width;
            int c = 0;
            for (; c + kLanes <= D; c += kLanes) store_as(row + c, load(to[r] + c));
            for (; c < D; ++c) from_float(row + c, to[r][c]);
        }
    }
}

template <class T>
static void attend_head_of(const void* qkv, int64_t item, int64_t tokens, int64_t heads, int64_t d, void* out,
                           float* scratch) {
    const int64_t image = item / heads, head = item % heads, width = heads * d;
    const T* from = static_cast<const T*>(qkv) + image * tokens * 3 * width + head * d;
    T* to = static_cast<T*>(out) + image * tokens * width + head * d;
    if (d == 8) attend_head<8>(from, tokens, heads, to, scratch);
    if (d == 16) attend_head<16>(from, tokens, heads, to, scratch);
    if (d == 32) attend_head<32>(from, tokens, heads, to, scratch);
    if (d == 64) attend_head<64>(from, tokens, heads, to, scratch);
}

// scratch: 3 (tokens rounded up to 32) d floats.
static void attention_item(const void* qkv, Dtype dtype, int64_t item, int64_t tokens, int64_t heads, int64_t d,
                           void* out, float* scratch) {
    if (dtype == Dtype::f32)
        attend_head_of<float>(qkv, item, tokens, heads, d, out, scratch);
    else if (dtype == Dtype::bf16)
        attend_head_of<Bf16>(qkv, item, tokens, heads, d, out, scratch);
    else
        attend_head_of<F16>(qkv, item, tokens, heads, d, out, scratch);
}
