// What the kernels of the distillation loss share: their argument, the choice of rows, and the sum over all rows.
#pragma once
#include <cuda_runtime.h>

#include "cuda/distillation/distillation_loss.h"
#include "cuda/device/group.h"
#include "cuda/device/launch.h"
#include "cuda/device/rows.h"

namespace kr {
namespace cuda {

// A kernel's argument: the call, its memory, and what follows from both once and for all.
struct DistillationJob {
    DistillationLoss call;
    DistillationBuffers buffers;
    bool forward, from_stats;
    const float* known_scale;  // device scalar that gradients are multiplied by, or null: then host_scale
    float host_scale;
    float inverse_t, exponent;                     // 1 / T, log2(e) / T
    int input_access, target_access, grad_access;  // bytes that one access may take
};

// Blocks of a multiprocessor, for which registers are kept: 80 a thread with up to 8 elements of each row in registers,
// else 128. What is in flight then suffices: 16 warps that read 2 KB or more each.
constexpr int min_blocks(int elements, int threads) {
    const int blocks = (elements <= 8 ? 768 : 512) / threads;
    return blocks > 1 ? blocks : 1;
}

struct DistillationRow {
    int64_t row;
    int label;             // -1 where it is not in [0, classes)
    float weight, factor;  // factor of the gradient; 0 says that the gradient is 0 whatever the row holds
    bool read;             // a row of weight 0 is not
};

KR_HOST_DEVICE bool reads_teacher_logits(const DistillationLoss& call) {
    return call.soft != 0.0f && call.target_kind == TargetKind::logits;
}

KR_FN bool has_nothing_to_do(const DistillationJob& job) {
    return job.buffers.unless_one && *job.buffers.upstream == 1.0f;
}

KR_FN DistillationRow row_of(const DistillationJob& job, int64_t row) {
    const DistillationLoss& call = job.call;
    DistillationRow out = {row, -1, call.weight ? call.weight[row] : 1.0f, 0.0f, false};
    if (call.labels) {
        const int64_t label = call.labels[row];
        if (label == call.ignore_index) out.weight = 0.0f;
        if (label >= 0 && label < call.classes) out.label = (int)label;
    }
    if (job.buffers.grad && out.weight != 0.0f) {
        out.factor = job.known_scale ? *job.known_scale : job.host_scale;
        if (job.buffers.upstream) out.factor = job.buffers.upstream[row * job.buffers.upstream_step] * out.factor;
        out.factor *= out.weight;
    }
    out.read = out.weight != 0.0f && (job.forward || out.factor != 0.0f);
    return out;
}

// ---------------------------------------------------------------- the sum over all rows

// Called by all threads of all blocks with the sums of their own rows. The last block to come adds up what the others
// left, in the order of the blocks: the same sum in every run. It leaves the counter at 0 for the next launch.
template <int THREADS>
KR_FN void finish(const DistillationJob& job, float loss, float weight) {
    __shared__ double sums[2][THREADS / 32];
    __shared__ bool last;
    const int thread = threadIdx.x;
    double both[2] = {loss, weight};
    auto block_sum = [&] {
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int step = 16; step > 0; step /= 2) both[k] += __shfl_xor_sync(0xFFFFFFFFu, both[k], step);
        if (thread % 32 == 0) sums[0][thread / 32] = both[0], sums[1][thread / 32] = both[1];
        __syncthreads();
        both[0] = both[1] = 0;
        for (int w = 0; w < THREADS / 32; ++w) both[0] += sums[0][w], both[1] += sums[1][w];
    };
    __syncthreads();
    block_sum();
    if (gridDim.x > 1) {
        float* partial = job.buffers.workspace;
        if (thread == 0) {
            partial[2 * blockIdx.x] = (float)both[0], partial[2 * blockIdx.x + 1] = (float)both[1];
            __threadfence();
            uint32_t* counter = reinterpret_cast<uint32_t*>(partial + 2 * kDistillationBlocks);
            last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
            __threadfence();
        }
        __syncthreads();
        if (!last) return;
        both[0] = both[1] = 0;
        for (unsigned block = thread; block < gridDim.x; block += THREADS)
            both[0] += __ldcg(partial + 2 * block), both[1] += __ldcg(partial + 2 * block + 1);
        block_sum();
    }
    if (thread == 0) {
        float scale = 1.0f;
        if (job.known_scale)
            scale = *job.known_scale;
        else if (job.call.mean)
            scale = both[1] > 0 ? (float)(1.0 / both[1]) : 0.0f;
        if (job.buffers.loss) *job.buffers.loss = (float)(both[0] * scale);
        if (job.buffers.scale && !job.known_scale) *job.buffers.scale = scale;
    }
}

// The end of a forward launch: the sum, or, where rows were requested, only the factor of their gradients.
template <int THREADS>
KR_FN void finish_forward(const DistillationJob& job, float loss, float weight) {
    if (!job.buffers.row_loss)
        finish<THREADS>(job, loss, weight);
    else if (job.buffers.scale && blockIdx.x == 0 && threadIdx.x == 0)
        *job.buffers.scale = 1.0f;
}

KR_FN void take_row(const DistillationJob& job, const DistillationRow& row, float row_loss, float& loss,
                    float& weight) {
    const float weighted = row.weight == 0.0f ? 0.0f : row.weight * row_loss;
    if (job.buffers.row_loss) job.buffers.row_loss[row.row] = weighted;
    loss += weighted, weight += row.weight;
}

// Launchers of the regimes, by number of blocks. Each returns a cudaError_t.
int launch_thread_rows(const DistillationJob& job, void* cuda_stream);   // up to 32 classes
int launch_warp_rows(const DistillationJob& job, void* cuda_stream);     // up to 1,024
int launch_block_rows(const DistillationJob& job, void* cuda_stream);    // beyond
int launch_cluster_rows(const DistillationJob& job, void* cuda_stream);  // above kMostInRegisters, if clusters_hold

constexpr int64_t kMostInRegisters = 16384;  // classes of a row that a block keeps there

// Whether rows go to clusters: these need compute capability 9.0, and a row that fits in the shared memory of 8 blocks.
// cluster_size: how many blocks hold one, or 0.
bool clusters_hold(const DistillationJob& job);
int cluster_size(const DistillationJob& job);

inline unsigned grid_of(int64_t items) { return grid_of(items, kDistillationBlocks); }

}  // namespace cuda
}  // namespace kr
