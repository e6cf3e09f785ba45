// The launches of the distillation loss, and its kernel for up to 32 classes.
#include "cuda/distillation/distillation_loss.h"

#include <cuda_runtime.h>

#include "cuda/distillation/distillation_loss_row.h"
#include "cuda/device/tile.h"

namespace kr {
namespace cuda {
namespace {

// ---------------------------------------------------------------- up to 32 classes: one thread a row

constexpr int kThreads = 128, kMostClasses = 32;

// COLUMNS: the class count rounded up, all in registers.
template <int COLUMNS>
__global__ void __launch_bounds__(kThreads, min_blocks(COLUMNS, kThreads)) thread_rows(const DistillationJob job) {
    extern __shared__ float shared[];
    if (has_nothing_to_do(job)) return;
    const DistillationLoss& call = job.call;
    const int classes = (int)call.classes, length = classes | 1;
    const bool dense = call.soft != 0.0f && !call.indices;
    float *students = shared, *teachers = shared + kThreads * length;
    float loss = 0.0f, weight = 0.0f;
    const int64_t tiles = (call.rows + kThreads - 1) / kThreads;
    for (int64_t each = blockIdx.x; each < tiles; each += gridDim.x) {
        const Tile<kThreads> tile(each, call.rows, classes);
        with_dtype(call.input_dtype,
                   [&](auto dtype) { copy_in<decltype(dtype)>(tile, call.input, call.input_stride, students); });
        if (dense)
            with_dtype(call.target_dtype,
                       [&](auto dtype) { copy_in<decltype(dtype)>(tile, call.target, call.target_stride, teachers); });
        __syncthreads();
        const int thread = opaque((int)threadIdx.x), columns = opaque(classes);
        if (thread < tile.rows) {
            const DistillationRow row = row_of(job, tile.first + thread);
            float *own = students + thread * length, row_loss = 0.0f;
            float s[COLUMNS], t[COLUMNS];
            if (row.read) {
                const float* own_t = teachers + thread * length;
                const float beyond = !dense || call.target_kind == TargetKind::probs ? 0.0f : -INFINITY;
#pragma unroll
                for (int k = 0; k < COLUMNS; ++k) {
                    s[k] = k < columns ? own[k] : -INFINITY;
                    t[k] = dense && k < columns ? own_t[k] : beyond;
                }
                if (call.indices && call.soft != 0.0f) read_topk<Layout<1, COLUMNS, 1>>(job, row.row, 0, 0, t);
                if (call.soft != 0.0f) teacher_logs(job, t);
                WarpGroup<1> group(thread);
                row_loss = whole_row<Layout<1, COLUMNS, 1>>(job, row, group, s, t);
            }
            if (job.buffers.grad)
#pragma unroll
                for (int k = 0; k < COLUMNS; ++k)
                    if (k < columns) own[k] = row.factor != 0.0f ? s[k] : 0.0f;
            if (job.forward) take_row(job, row, row_loss, loss, weight);
        }
        __syncthreads();
        if (job.buffers.grad) {
            with_dtype(call.input_dtype,
                       [&](auto dtype) { copy_out<decltype(dtype)>(tile, students, job.buffers.grad); });
            __syncthreads();
        }
    }
    if (job.forward) finish_forward<kThreads>(job, loss, weight);
}

template <int COLUMNS>
int launch(const DistillationJob& job, cudaStream_t queue) {
    const size_t bytes = 2 * sizeof(float) * kThreads * (size_t)(job.call.classes | 1);
    thread_rows<COLUMNS><<<grid_of((job.call.rows + kThreads - 1) / kThreads), kThreads, bytes, queue>>>(job);
    return cudaGetLastError();
}

// ---------------------------------------------------------------- the weights alone

constexpr int kWeightThreads = 256;

__global__ void __launch_bounds__(kWeightThreads) sum_weights(const DistillationJob job) {
    float weight = 0.0f;
    const int64_t step = (int64_t)gridDim.x * kWeightThreads;
    for (int64_t row = (int64_t)blockIdx.x * kWeightThreads + threadIdx.x; row < job.call.rows; row += step)
        weight += row_of(job, row).weight;
    finish<kWeightThreads>(job, 0.0f, weight);
}

// ---------------------------------------------------------------- dispatch

DistillationJob job_of(const DistillationLoss& call, const DistillationBuffers& buffers) {
    DistillationJob job = {};
    job.call = call, job.buffers = buffers;
    job.host_scale = 1.0f;
    job.inverse_t = 1.0f / call.temperature, job.exponent = kLog2E / call.temperature;
    const int size = call.input_dtype == Dtype::f32 ? 4 : 2, target_size = call.target_dtype == Dtype::f32 ? 4 : 2;
    job.input_access = access_of(call.input, call.input_stride * size, call.classes * size);
    job.target_access = access_of(call.target, call.target_stride * target_size, call.classes * target_size);
    job.grad_access = access_of(buffers.grad, 0, call.classes * size);
    return job;
}

int launch_by_classes(const DistillationJob& job, void* cuda_stream) {
    const int64_t classes = job.call.classes;
    auto queue = (cudaStream_t)cuda_stream;
    // No rows go to a single block: several would meet in the workspace, which losses by row come without.
    if (classes > kMostInRegisters && job.call.rows > 0 && clusters_hold(job))
        return launch_cluster_rows(job, cuda_stream);
    if (classes > 1024) return launch_block_rows(job, cuda_stream);
    if (classes > kMostClasses) return launch_warp_rows(job, cuda_stream);
    return classes <= 4    ? launch<4>(job, queue)
           : classes <= 8  ? launch<8>(job, queue)
           : classes <= 12 ? launch<12>(job, queue)
           : classes <= 16 ? launch<16>(job, queue)
           : classes <= 24 ? launch<24>(job, queue)
                           : launch<32>(job, queue);
}

}  // namespace

int distillation_loss_forward(const DistillationLoss& call, const DistillationBuffers& buffers, void* cuda_stream) {
    DistillationJob job = job_of(call, buffers);
    job.forward = true;
    job.buffers.upstream = nullptr, job.buffers.unless_one = false;
    // Short rows are on the chip anyway: to take their sums again costs less than 20 bytes a row.
    if (call.classes <= kMostClasses) job.buffers.stats = nullptr;
    if (buffers.grad && call.mean) {
        if (call.labels || call.weight) {
            DistillationJob weights = job;
            weights.buffers.loss = nullptr, weights.buffers.grad = nullptr;
            sum_weights<<<grid_of((call.rows + 1023) / 1024), kWeightThreads, 0, (cudaStream_t)cuda_stream>>>(weights);
            const int status = cudaGetLastError();
            if (status != cudaSuccess) return status;
            job.known_scale = buffers.scale;
        } else {
            job.host_scale = call.rows > 0 ? 1.0f / (float)call.rows : 0.0f;
        }
    }
    return launch_by_classes(job, cuda_stream);
}

int distillation_loss_cluster(const DistillationLoss& call) {
    return call.classes > kMostInRegisters ? cluster_size(job_of(call, {})) : 0;
}

int distillation_loss_backward(const DistillationLoss& call, const DistillationBuffers& buffers, void* cuda_stream) {
    if (call.rows == 0) return cudaSuccess;
    DistillationJob job = job_of(call, buffers);
    job.known_scale = buffers.scale;
    job.from_stats = buffers.stats && call.classes > kMostClasses;
    return launch_by_classes(job, cuda_stream);
}

}  // namespace cuda
}  // namespace kr
