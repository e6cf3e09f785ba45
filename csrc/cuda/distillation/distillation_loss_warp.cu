// The distillation loss of 33 to 1,024 classes: 8, 16 or 32 lanes of a warp hold both rows in registers, read once.
#include <cuda_runtime.h>

#include "cuda/distillation/distillation_loss_row.h"

namespace kr {
namespace cuda {
namespace {

constexpr int kThreads = 128;

template <bool kHalf, int V, int CHUNKS, int LANES>
__global__ void __launch_bounds__(kThreads, min_blocks(V* CHUNKS, kThreads)) warp_rows(const DistillationJob job) {
    if (has_nothing_to_do(job)) return;
    constexpr int kGroups = kThreads / LANES;
    WarpGroup<LANES> group((int)threadIdx.x);
    float loss = 0.0f, weight = 0.0f;
    const int64_t step = (int64_t)gridDim.x * kGroups;
    for (int64_t at = (int64_t)blockIdx.x * kGroups + threadIdx.x / LANES; at < job.call.rows; at += step) {
        const DistillationRow row = row_of(job, at);
        group.lane = opaque(group.lane);
        float s[V * CHUNKS], t[V * CHUNKS], row_loss = 0.0f;
        if (row.read) {
            read_columns<kHalf, V, CHUNKS, LANES>(job, at, 0, group.lane, s, t);
            row_loss = whole_row<Layout<V, CHUNKS, LANES>>(job, row, group, s, t);
        }
        if (job.buffers.grad) {
            if (row.factor == 0.0f)
#pragma unroll
                for (int k = 0; k < V * CHUNKS; ++k) s[k] = 0.0f;
            write_columns<kHalf, V, CHUNKS, LANES>(job, at, 0, group.lane, s);
        }
        if (job.forward && group.lane == 0) take_row(job, row, row_loss, loss, weight);
    }
    if (job.forward) finish_forward<kThreads>(job, loss, weight);
}

template <bool kHalf, int V, int CHUNKS, int LANES>
int launch(const DistillationJob& job, cudaStream_t queue) {
    const int64_t groups = kThreads / LANES;
    warp_rows<kHalf, V, CHUNKS, LANES><<<grid_of((job.call.rows + groups - 1) / groups), kThreads, 0, queue>>>(job);
    return cudaGetLastError();
}

}  // namespace

int launch_warp_rows(const DistillationJob& job, void* cuda_stream) {
    const int64_t classes = job.call.classes;
    auto queue = (cudaStream_t)cuda_stream;
    if (job.call.input_dtype == Dtype::f32)
        return classes <= 64    ? launch<false, 4, 2, 8>(job, queue)
               : classes <= 128 ? launch<false, 4, 2, 16>(job, queue)
               : classes <= 256 ? launch<false, 4, 2, 32>(job, queue)
               : classes <= 512 ? launch<false, 4, 4, 32>(job, queue)
                                : launch<false, 4, 8, 32>(job, queue);
    return classes <= 64    ? launch<true, 8, 1, 8>(job, queue)
           : classes <= 128 ? launch<true, 8, 1, 16>(job, queue)
           : classes <= 256 ? launch<true, 8, 1, 32>(job, queue)
           : classes <= 512 ? launch<true, 8, 2, 32>(job, queue)
                            : launch<true, 8, 4, 32>(job, queue);
}

}  // namespace cuda
}  // namespace kr
