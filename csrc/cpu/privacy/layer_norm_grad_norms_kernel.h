// Included once per instruction set by layer_norm_grad_norms.cpp.
//
// With n = (x - mean) rstd of each row: dw = sum(dy n), db = sum(dy) over a record's rows. Rows are taken four at a
// time: their statistics, then their terms, which finds them in L1 and reads the sums once for the four.
#include "cpu/simd/lanes_io.h"

#include "cpu/nn/kernels/column_blocks.h"

constexpr int kNormRows = 4;

// Mean and 1 / sqrt(var + eps) of rows side by side, whose sums do not wait for each other.
template <int kRows, class T>
KR_FN void row_statistics(const T* x, int64_t size, double eps, float* mean, float* rstd) {
    const int64_t whole = size / kLanes * kLanes;
    const int rest = (int)(size - whole);
    f32v sum[kRows] = {}, square[kRows] = {};
    for (int64_t i = 0; i < whole; i += kLanes)
        KR_UNROLL for (int r = 0; r < kRows; ++r) sum[r] = sum[r] + load_as(x + r * size + i);
    for (int r = 0; r < kRows; ++r) {
        if (rest) sum[r] = sum[r] + load_as_part(x + r * size + whole, rest);
        mean[r] = reduce_sum(sum[r]) / (float)size;
    }
    for (int64_t i = 0; i < whole; i += kLanes) {
        KR_UNROLL for (int r = 0; r < kRows; ++r) {
            const f32v d = load_as(x + r * size + i) - splat(mean[r]);
            square[r] = fma(d, d, square[r]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        double squares = (double)reduce_sum(square[r]);
        for (int64_t i = whole; i < size; ++i) {
            const double d = (double)(to_float(x[r * size + i]) - mean[r]);
            squares += d * d;
        }
        rstd[r] = (float)(1.0 / __builtin_sqrt(squares / (double)size + eps));
    }
}

template <class T, int kRows>
struct AddRows {
    template <int V>
    KR_FN void run(const T* x, const T* grad, int64_t size, const float* mean, const float* rstd, float* weight,
                   float* bias, int64_t c, int live) {
        f32v one[V] = {}, two[V] = {};
        KR_UNROLL for (int r = 0; r < kRows; ++r) {
            KR_UNROLL for (int v = 0; v < V; ++v) {
                const int64_t at = r * size + c + v * kLanes;
                const f32v g = read(grad + at, live), d = read(x + at, live) - splat(mean[r]);
                one[v] = one[v] + g;
                two[v] = fma(g, d * splat(rstd[r]), two[v]);
            }
        }
        KR_UNROLL for (int v = 0; v < V; ++v) {
            float *w = weight + c + v * kLanes, *b = bias + c + v * kLanes;
            store(w, load(w) + two[v]);
            store(b, load(b) + one[v]);
        }
    }
};

template <class T, int kRows>
KR_FN void add_rows(const LayerNormGradNorms& call, int64_t row, float* weight, float* bias) {
    const T *x = static_cast<const T*>(call.x) + row * call.size, *grad = static_cast<const T*>(call.grad);
    float mean[kRows], rstd[kRows];
    row_statistics<kRows>(x, call.size, (double)call.eps, mean, rstd);
    each_block<AddRows<T, kRows>, 1>(call.size, x, grad + row * call.size, call.size, mean, rstd, weight, bias);
}

template <class T>
static void layer_norm_sums(const LayerNormGradNorms& call, int64_t record, float* weight, float* bias) {
    const int64_t end = (record + 1) * call.rows;
    int64_t row = record * call.rows;
    for (; row + kNormRows <= end; row += kNormRows) add_rows<T, kNormRows>(call, row, weight, bias);
    for (; row < end; ++row) add_rows<T, 1>(call, row, weight, bias);
}

// weight and bias: zeros, with room for whole vectors.
static void layer_norm_record(const LayerNormGradNorms& call, int64_t record, float* weight, float* bias) {
    if (call.dtype == Dtype::f32)
        layer_norm_sums<float>(call, record, weight, bias);
    else if (call.dtype == Dtype::bf16)
        layer_norm_sums<Bf16>(call, record, weight, bias);
    else
        layer_norm_sums<F16>(call, record, weight, bias);
}
