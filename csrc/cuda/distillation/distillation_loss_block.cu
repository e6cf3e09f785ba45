// The distillation loss of more than 1,024 classes: a block a row. Up to 16,384 classes both rows stay in registers and
// are read once. Beyond, the sums are taken online in a first sweep and the terms in a second one, which goes back from
// the row's end, so that what the first read last is still in the cache.
#include <cuda_runtime.h>

#include "cuda/distillation/distillation_loss_row.h"

namespace kr {
namespace cuda {
namespace {

template <bool kHalf, int V, int CHUNKS, int THREADS>
__global__ void __launch_bounds__(THREADS, min_blocks(V* CHUNKS, THREADS)) block_rows(const DistillationJob job) {
    if (has_nothing_to_do(job)) return;
    BlockGroup<THREADS> group((int)threadIdx.x);
    float loss = 0.0f, weight = 0.0f;
    for (int64_t at = blockIdx.x; at < job.call.rows; at += gridDim.x) {
        const DistillationRow row = row_of(job, at);
        group.lane = opaque(group.lane);
        float s[V * CHUNKS], t[V * CHUNKS], row_loss = 0.0f;
        if (row.read) {
            read_columns<kHalf, V, CHUNKS, THREADS>(job, at, 0, group.lane, s, t);
            row_loss = whole_row<Layout<V, CHUNKS, THREADS>>(job, row, group, s, t);
        }
        if (job.buffers.grad) {
            if (row.factor == 0.0f)
#pragma unroll
                for (int k = 0; k < V * CHUNKS; ++k) s[k] = 0.0f;
            write_columns<kHalf, V, CHUNKS, THREADS>(job, at, 0, group.lane, s);
        }
        if (job.forward && group.lane == 0) take_row(job, row, row_loss, loss, weight);
    }
    if (job.forward) finish_forward<THREADS>(job, loss, weight);
}

// A maximum and sums of exponentials below it, brought up to date by a few elements at a time.
struct Online {
    float top = -INFINITY, sum = 0.0f, sum_1 = 0.0f;

    template <int K>
    KR_INLINE void take(const float (&x)[K], float exponent, bool hard) {
        float most = x[0];
#pragma unroll
        for (int k = 1; k < K; ++k) most = fmaxf(most, x[k]);
        if (most > top) {
            sum *= exp2_fast((top - most) * exponent), sum_1 *= exp2_fast((top - most) * kLog2E);
            top = most;
        }
        float part = 0.0f, part_1 = 0.0f;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (x[k] == -INFINITY) continue;  // also where nothing but -inf has come yet
            part += exp2_fast((x[k] - top) * exponent);
            if (hard) part_1 += exp2_fast((x[k] - top) * kLog2E);
        }
        sum += part, sum_1 += part_1;
    }
};

constexpr int kStreamThreads = 512;

template <bool kHalf, int V, int CHUNKS>
__global__ void __launch_bounds__(kStreamThreads, 2) stream_rows(const DistillationJob job) {
    using Columns = Layout<V, CHUNKS, kStreamThreads>;
    using Group = BlockGroup<kStreamThreads>;
    if (has_nothing_to_do(job)) return;
    const DistillationLoss& call = job.call;
    const int classes = (int)call.classes, last = (classes - 1) / Columns::columns * Columns::columns;
    const bool hard = call.hard != 0.0f, logits = reads_teacher_logits(call);
    const bool decoupled = call.divergence == Divergence::decoupled;
    Group group((int)threadIdx.x);
    float loss = 0.0f, weight = 0.0f, s[Columns::count], t[Columns::count];
    for (int64_t at = blockIdx.x; at < call.rows; at += gridDim.x) {
        const DistillationRow row = row_of(job, at);
        RowState state;
        auto read = [&](int first) {
            read_columns<kHalf, V, CHUNKS, kStreamThreads>(job, at, first, group.lane, s, t);
            if (decoupled) take_label_out<Columns>(row, first, group.lane, s, t);
        };
        if (row.read) {
            read_label(job, row, state);
            if (job.from_stats) {
                load_state(job, at, state);
            } else {
                Online student, teacher;
                for (int first = 0; first < classes; first += Columns::columns) {
                    read(first);
                    student.take(s, job.exponent, hard);
                    if (logits) teacher.take(t, job.exponent, false);
                }
                float tops[2] = {student.top, logits ? teacher.top : 0.0f};
                group.max(tops);
                state.top = tops[0], state.top_t = tops[1];
                float sums[3] = {student.sum * exp2_fast((student.top - tops[0]) * job.exponent),
                                 student.sum_1 * exp2_fast((student.top - tops[0]) * kLog2E),
                                 teacher.sum * exp2_fast((teacher.top - tops[1]) * job.exponent)};
                group.sum(sums);
                set_sums(job, sums, state);
                if (job.buffers.stats && group.lane == 0) store_state(job, at, state);
            }
        }
        float terms[2] = {0.0f, 0.0f};
        for (int first = last; first >= 0; first -= Columns::columns) {
            if (row.read) {
                read(first);
                terms[0] += soft_terms(job, state, s, t);
                if (job.forward && hard && call.smoothing != 0.0f)
#pragma unroll
                    for (int k = 0; k < Columns::count; ++k)
                        if (first + Columns::column(group.lane, k) < classes) terms[1] += s[k];
                if (row.factor != 0.0f) gradient<Columns>(job, row, state, first, group.lane, s, t);
            }
            if (job.buffers.grad) {
                if (row.factor == 0.0f)
#pragma unroll
                    for (int k = 0; k < Columns::count; ++k) s[k] = 0.0f;
                write_columns<kHalf, V, CHUNKS, kStreamThreads>(job, at, first, group.lane, s);
            }
        }
        if (job.forward) {
            float row_value = 0.0f;
            if (row.read) {
                group.sum(terms);
                row_value = row_loss(job, row, state, terms[0], terms[1]);
            }
            if (group.lane == 0) take_row(job, row, row_value, loss, weight);
        }
    }
    if (job.forward) finish_forward<kStreamThreads>(job, loss, weight);
}

template <bool kHalf, int V, int CHUNKS, int THREADS>
int launch(const DistillationJob& job, cudaStream_t queue) {
    block_rows<kHalf, V, CHUNKS, THREADS><<<grid_of(job.call.rows), THREADS, 0, queue>>>(job);
    return cudaGetLastError();
}

template <bool kHalf, int V, int CHUNKS>
int stream(const DistillationJob& job, cudaStream_t queue) {
    stream_rows<kHalf, V, CHUNKS><<<grid_of(job.call.rows), kStreamThreads, 0, queue>>>(job);
    return cudaGetLastError();
}

}  // namespace

int launch_block_rows(const DistillationJob& job, void* cuda_stream) {
    const int64_t classes = job.call.classes;
    auto queue = (cudaStream_t)cuda_stream;
    if (job.call.input_dtype == Dtype::f32)
        return classes <= 2048    ? launch<false, 4, 2, 256>(job, queue)
               : classes <= 4096  ? launch<false, 4, 4, 256>(job, queue)
               : classes <= 8192  ? launch<false, 4, 8, 256>(job, queue)
               : classes <= 16384 ? launch<false, 4, 8, 512>(job, queue)
                                  : stream<false, 4, 2>(job, queue);
    return classes <= 2048    ? launch<true, 8, 1, 256>(job, queue)
           : classes <= 4096  ? launch<true, 8, 2, 256>(job, queue)
           : classes <= 8192  ? launch<true, 8, 4, 256>(job, queue)
           : classes <= 16384 ? launch<true, 8, 4, 512>(job, queue)
                              : stream<true, 8, 1>(job, queue);
}

}  // namespace cuda
}  // namespace kr
