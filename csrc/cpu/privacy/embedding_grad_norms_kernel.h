// Included once per instruction set by embedding_grad_norms.cpp.
#include "cpu/simd/lanes_io.h"

#include "cpu/nn/kernels/column_blocks.h"

// Adds the squares, which float32 need not hold, of the sum of the rows at `positions`.
template <class T>
struct SquareOfSum {
    template <int V>
    KR_FN void run(const T* grad, int64_t size, const int64_t* positions, int64_t count, double* square, int64_t c,
                   int live) {
        f32v sum[V] = {};
        for (int64_t i = 0; i < count; ++i)
            KR_UNROLL for (int v = 0; v < V; ++v) sum[v] =
                sum[v] + read(grad + positions[i] * size + c + v * kLanes, live);
        float lanes[V * kLanes];
        KR_UNROLL for (int v = 0; v < V; ++v) store(lanes + v * kLanes, sum[v]);
        double total[kLanes] = {};
        for (int v = 0; v < V; ++v)
            for (int i = 0; i < kLanes; ++i) total[i] += (double)lanes[v * kLanes + i] * (double)lanes[v * kLanes + i];
        for (int i = 0; i < kLanes; ++i) *square += total[i];
    }
};

template <class T>
static double square_of_sum(const EmbeddingGradNorms& call, const int64_t* positions, int64_t count) {
    double square = 0.0;
    each_block<SquareOfSum<T>, 4>(call.size, static_cast<const T*>(call.grad), call.size, positions, count, &square);
    return square;
}

// Of the rows of grad that one row of the table takes.
static double embedding_row(const EmbeddingGradNorms& call, const int64_t* positions, int64_t count) {
    if (call.dtype == Dtype::f32) return square_of_sum<float>(call, positions, count);
    if (call.dtype == Dtype::bf16) return square_of_sum<Bf16>(call, positions, count);
    return square_of_sum<F16>(call, positions, count);
}
