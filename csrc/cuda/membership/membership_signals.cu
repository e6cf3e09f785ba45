// Membership signals, each row of logits read once up to 16,384 classes: by a thread from a tile in shared memory (to
// 32 classes), by 8 to 32 lanes of a warp (to 1,024), by a block (beyond). What the formulas sum is explained in
// csrc/cpu/membership/membership_signals_kernel.h: w_j = e^(z_j - second), with `second` the largest logit but the
// first of the largest, so that neither 1 - p_y nor phi of a certain answer cancels or underflows.
#include "cuda/membership/membership_signals.h"

#include <cuda_runtime.h>

#include <cmath>

#include "cuda/device/group.h"
#include "cuda/device/launch.h"
#include "cuda/device/rows.h"
#include "cuda/device/tile.h"

namespace kr {
namespace cuda {
namespace {

struct SignalsJob : MembershipSignals {
    int access;  // bytes that one access may take
};

// The largest logit, the lowest class that holds it, and the largest of the other classes.
struct Top {
    float value = -INFINITY, second = -INFINITY;
    int first = 0x7FFFFFFF;

    KR_INLINE void take(float z, int column) {  // columns ascend
        first = z > value ? column : first;
        second = fmaxf(second, fminf(z, value));
        value = fmaxf(z, value);
    }
    KR_INLINE void merge(const Top& other) {
        const bool theirs = other.value > value || (other.value == value && other.first < first);
        second = fmaxf(fmaxf(second, other.second), fminf(value, other.value));
        value = fmaxf(value, other.value);
        first = theirs ? other.first : first;
    }
    // Where all classes but one are ruled out the scale is that of the top, so that no infinity meets itself.
    KR_INLINE float base() const { return second == -INFINITY ? value : second; }
};

template <int LANES>
KR_FN void merge_all(WarpGroup<LANES>& group, Top& top) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        Top other;
        other.value = __shfl_xor_sync(group.mask, top.value, step);
        other.second = __shfl_xor_sync(group.mask, top.second, step);
        other.first = __shfl_xor_sync(group.mask, top.first, step);
        top.merge(other);
    }
}

// Between two calls lies a sum over the block, whose barrier protects the scratch.
template <int THREADS>
KR_FN void merge_all(BlockGroup<THREADS>& group, Top& top) {
    __shared__ float values[THREADS / 32], seconds[THREADS / 32];
    __shared__ int firsts[THREADS / 32];
    WarpGroup<32> warp(group.lane);
    merge_all(warp, top);
    if (warp.lane == 0) {
        const int at = group.lane / 32;
        values[at] = top.value, seconds[at] = top.second, firsts[at] = top.first;
    }
    __syncthreads();
    top = Top();
    for (int w = 0; w < THREADS / 32; ++w) {
        Top other;
        other.value = values[w], other.second = seconds[w], other.first = firsts[w];
        top.merge(other);
    }
}

// Sums over the classes but the first of the largest.
struct Sums {
    float rest = 0.0f;      // of w_j
    float unlike = 0.0f;    // of w_j, the label's left out too
    float weighted = 0.0f;  // of w_j (z_j - base)

    // w of this logit.
    KR_INLINE float take(float z, int column, const Top& top, int label) {
        const float shifted = z - top.base(), w = column == top.first ? 0.0f : expf(shifted);
        rest += w;
        unlike += column == label ? 0.0f : w;
        weighted += w == 0.0f ? 0.0f : w * shifted;
        return w;
    }
};

// What all signals follow from but the sum over classes of modified_entropy.
struct RowSignals {
    float phi, loss, entropy, inverse, sum, k, complement_y, surprise;
    bool correct;

    KR_INLINE RowSignals(const Top& top, const Sums& sums, float z_y, int label) {
        correct = top.first == label;
        const bool alone = top.second == -INFINITY;
        const float gap = top.base() - top.value;
        k = expf(gap);
        sum = fmaf(k, sums.rest, 1.0f);
        inverse = 1.0f / sum;
        // The rivals of a label that is first are summed on the scale of the second, else on that of the first.
        if (correct)
            phi = alone ? INFINITY : z_y - top.second - logf(sums.rest);
        else
            phi = z_y - top.value - logf(fmaf(k, sums.unlike, 1.0f));
        loss = fmaxf(-phi, 0.0f) + log1pf(expf(-fabsf(phi)));
        const float log_sum = logf(sum), p_rest = k * sums.rest * inverse;
        entropy = log_sum - k * fmaf(gap, sums.rest, sums.weighted) * inverse;
        complement_y = correct ? p_rest : 1.0f - expf(z_y - top.value) * inverse;
        surprise = alone ? INFINITY : log_sum - gap - logf(sums.rest);  // -ln(1 - p_first)
    }

    // -p_j ln(1 - p_j) of a class that is neither the first nor the label: p is at most 1/2.
    KR_INLINE float term(float w) const {
        const float e = w * k;
        return e * inverse * -logf((sum - e) * inverse);
    }

    // `terms`: the sum of those.
    KR_INLINE void write(const SignalOutputs& out, int64_t row, float terms) const {
        if (out.phi) out.phi[row] = phi;
        if (out.loss) out.loss[row] = loss;
        if (out.entropy) out.entropy[row] = entropy;
        if (out.confidence) out.confidence[row] = expf(-loss);
        if (out.correct) out.correct[row] = correct ? 1.0f : 0.0f;
        if (out.modified_entropy) {
            const float total = fmaf(complement_y, loss, terms);
            out.modified_entropy[row] = correct ? total : total + inverse * surprise;
        }
    }
};

// ---------------------------------------------------------------- up to 32 classes: one thread a row

constexpr int kTileThreads = 128, kTileClasses = 32;

__global__ void __launch_bounds__(kTileThreads) thread_signals(const SignalsJob job) {
    extern __shared__ float shared[];
    const int classes = (int)job.classes, thread = (int)threadIdx.x;
    const int64_t tiles = (job.rows + kTileThreads - 1) / kTileThreads;
    for (int64_t each = blockIdx.x; each < tiles; each += gridDim.x) {
        const Tile<kTileThreads> tile(each, job.rows, classes);
        with_dtype(job.dtype, [&](auto dtype) { copy_in<decltype(dtype)>(tile, job.logits, job.stride, shared); });
        __syncthreads();
        if (thread < tile.rows) {
            float* own = shared + thread * tile.length;
            const int label = (int)job.labels[tile.first + thread];
            const float z_y = own[label];
            Top top;
            for (int j = 0; j < classes; ++j) top.take(own[j], j);
            Sums sums;
            for (int j = 0; j < classes; ++j) own[j] = sums.take(own[j], j, top, label);
            const RowSignals signals(top, sums, z_y, label);
            float terms = 0.0f;
            if (job.out.modified_entropy)
                for (int j = 0; j < classes; ++j) terms += j == label ? 0.0f : signals.term(own[j]);
            signals.write(job.out, tile.first + thread, terms);
        }
        __syncthreads();
    }
}

// ---------------------------------------------------------------- up to 16,384: lanes of a warp, or a block, a row

KR_FN int label_of(const SignalsJob& job, int64_t row, float& z_y) {
    const int label = (int)job.labels[row];
    z_y = read_element(job.logits, job.dtype, row * job.stride + label);
    return label;
}

template <int CHUNKS, class Group>
KR_FN void read_signals_row(const SignalsJob& job, const Group& group, int64_t row, int first, float (&z)[4 * CHUNKS]) {
    with_dtype(job.dtype, [&](auto dtype) {
        read_row<decltype(dtype), 4, CHUNKS, Group::lanes>(job.logits, row * job.stride, job.access, first,
                                                           (int)job.classes, group.lane, false, z);
    });
}

template <int CHUNKS, class Group>
KR_FN void whole_row(const SignalsJob& job, Group& group, int64_t row) {
    using Columns = Layout<4, CHUNKS, Group::lanes>;
    float z[Columns::count], z_y;
    const int label = label_of(job, row, z_y);
    read_signals_row<CHUNKS>(job, group, row, 0, z);
    Top top;
#pragma unroll
    for (int k = 0; k < Columns::count; ++k) top.take(z[k], Columns::column(group.lane, k));
    merge_all(group, top);
    Sums sums;
#pragma unroll
    for (int k = 0; k < Columns::count; ++k) z[k] = sums.take(z[k], Columns::column(group.lane, k), top, label);
    float all[3] = {sums.rest, sums.unlike, sums.weighted};
    group.sum(all);
    sums.rest = all[0], sums.unlike = all[1], sums.weighted = all[2];
    const RowSignals signals(top, sums, z_y, label);
    float terms[1] = {0.0f};
    if (job.out.modified_entropy) {
#pragma unroll
        for (int k = 0; k < Columns::count; ++k)
            terms[0] += Columns::column(group.lane, k) == label ? 0.0f : signals.term(z[k]);
        group.sum(terms);
    }
    if (group.lane == 0) signals.write(job.out, row, terms[0]);
}

constexpr int kWarpThreads = 128;

template <int CHUNKS, int LANES>
__global__ void __launch_bounds__(kWarpThreads) warp_signals(const SignalsJob job) {
    constexpr int kGroups = kWarpThreads / LANES;
    WarpGroup<LANES> group((int)threadIdx.x);
    const int64_t step = (int64_t)gridDim.x * kGroups;
    for (int64_t row = (int64_t)blockIdx.x * kGroups + threadIdx.x / LANES; row < job.rows; row += step)
        whole_row<CHUNKS>(job, group, row);
}

template <int CHUNKS, int THREADS>
__global__ void __launch_bounds__(THREADS) block_signals(const SignalsJob job) {
    BlockGroup<THREADS> group((int)threadIdx.x);
    for (int64_t row = blockIdx.x; row < job.rows; row += gridDim.x) whole_row<CHUNKS>(job, group, row);
}

// ---------------------------------------------------------------- beyond: a block, in two sweeps and perhaps a third

constexpr int kStreamThreads = 512, kStreamChunks = 2;

// Every other sweep goes back from the row's end: what was read last is still in the cache.
__global__ void __launch_bounds__(kStreamThreads) stream_signals(const SignalsJob job) {
    using Group = BlockGroup<kStreamThreads>;
    using Columns = Layout<4, kStreamChunks, Group::lanes>;
    const int classes = (int)job.classes, last = (classes - 1) / Columns::columns * Columns::columns;
    Group group((int)threadIdx.x);
    float z[Columns::count], z_y;
    for (int64_t row = blockIdx.x; row < job.rows; row += gridDim.x) {
        const int label = label_of(job, row, z_y);
        Top top;
        for (int first = 0; first < classes; first += Columns::columns) {
            read_signals_row<kStreamChunks>(job, group, row, first, z);
#pragma unroll
            for (int k = 0; k < Columns::count; ++k) top.take(z[k], first + Columns::column(group.lane, k));
        }
        merge_all(group, top);
        Sums sums;
        for (int first = last; first >= 0; first -= Columns::columns) {
            read_signals_row<kStreamChunks>(job, group, row, first, z);
            Sums part;  // block by block, for the digits of long sums
#pragma unroll
            for (int k = 0; k < Columns::count; ++k)
                part.take(z[k], first + Columns::column(group.lane, k), top, label);
            sums.rest += part.rest, sums.unlike += part.unlike, sums.weighted += part.weighted;
        }
        float all[3] = {sums.rest, sums.unlike, sums.weighted};
        group.sum(all);
        sums.rest = all[0], sums.unlike = all[1], sums.weighted = all[2];
        const RowSignals signals(top, sums, z_y, label);
        float terms[1] = {0.0f};
        if (job.out.modified_entropy) {
            for (int first = 0; first < classes; first += Columns::columns) {
                read_signals_row<kStreamChunks>(job, group, row, first, z);
                Sums unused;
#pragma unroll
                for (int k = 0; k < Columns::count; ++k) {
                    const int column = first + Columns::column(group.lane, k);
                    const float w = unused.take(z[k], column, top, label);
                    terms[0] += column == label ? 0.0f : signals.term(w);
                }
            }
            group.sum(terms);
        }
        if (group.lane == 0) signals.write(job.out, row, terms[0]);
    }
}

// ---------------------------------------------------------------- dispatch

template <int CHUNKS, int LANES>
void warps(const SignalsJob& job, cudaStream_t queue) {
    const int64_t groups = kWarpThreads / LANES;
    warp_signals<CHUNKS, LANES>
        <<<grid_of((job.rows + groups - 1) / groups, kMostBlocks), kWarpThreads, 0, queue>>>(job);
}

template <int CHUNKS, int THREADS>
void block(const SignalsJob& job, cudaStream_t queue) {
    block_signals<CHUNKS, THREADS><<<grid_of(job.rows, kMostBlocks), THREADS, 0, queue>>>(job);
}

}  // namespace

int membership_signals(const MembershipSignals& call, void* cuda_stream) {
    const int64_t rows = call.rows, classes = call.classes;
    if (rows == 0) return cudaSuccess;
    const int64_t size = call.dtype == Dtype::f32 ? 4 : 2;
    const SignalsJob job = {call, access_of(call.logits, call.stride * size, classes * size)};
    auto queue = (cudaStream_t)cuda_stream;
    if (classes <= kTileClasses) {
        const size_t bytes = sizeof(float) * kTileThreads * (size_t)(classes | 1);
        thread_signals<<<grid_of((rows + kTileThreads - 1) / kTileThreads, kMostBlocks), kTileThreads, bytes, queue>>>(
            job);
    } else if (classes <= 64) {
        warps<2, 8>(job, queue);
    } else if (classes <= 128) {
        warps<2, 16>(job, queue);
    } else if (classes <= 256) {
        warps<2, 32>(job, queue);
    } else if (classes <= 512) {
        warps<4, 32>(job, queue);
    } else if (classes <= 1024) {
        warps<8, 32>(job, queue);
    } else if (classes <= 2048) {
        block<2, 256>(job, queue);
    } else if (classes <= 4096) {
        block<4, 256>(job, queue);
    } else if (classes <= 8192) {
        block<8, 256>(job, queue);
    } else if (classes <= 16384) {
        block<8, 512>(job, queue);
    } else {
        stream_signals<<<grid_of(rows, kMostBlocks), kStreamThreads, 0, queue>>>(job);
    }
    return cudaGetLastError();
}

}  // namespace cuda
}  // namespace kr
