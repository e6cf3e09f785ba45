// The distillation loss of vocabularies on compute capability 9.0 and above: a cluster of 1, 2, 4 or 8 blocks holds a
// row of student and teacher in its shared memory, which is read once, and each block a slice of it.
//
// A warp is on its own with its piece of the slice: it starts the copy of its piece of the cluster's next row when it
// is through with this one, and waits for nobody but where the sums of the row come together, once a row: then each
// warp leaves its maxima and sums in every block, over distributed shared memory, and all add up the same numbers in
// the same order. Meanwhile other clusters on the same multiprocessors compute: three where a slice has up to 74 KB.
//
// What an element costs, bfloat16, both terms, T = 4, in clocks of one of 132 multiprocessors at 1.75 GHz: a
// prediction, in which only the instructions are counted and nothing is measured. Bytes: 6, or 0.32 clocks if a copy on
// an H200 reaches 4.3 TB/s, nine tenths of the vendor's 4.8. Exponentials: 2 for the sums, 2 for the terms, 1 for the
// gradient of the hard term, 5 of 16 a clock: 0.31 (one more for its sum where T is not 1, 2 or 4). Instructions: 46 in
// the compiled loops (1 for the maxima, 12 for the sums, 33 for terms and gradient) of 128 a clock: 0.36. So arithmetic
// should bound it there, hence the care for instructions in distillation_loss_plain.h.
#include <cuda_runtime.h>

#include <atomic>

#include "cuda/distillation/distillation_loss_plain.h"

namespace kr {
namespace cuda {
namespace {

constexpr int kMostBlocks = 8;  // of a cluster: what every device takes

struct ClusterPlan {
    int size, threads, region, target_size;  // blocks; of a block; columns of a warp; bytes of a teacher's element
    int student_at, teacher_at, bytes;       // in shared memory
    int clusters;                            // on the device at once
};

// ---------------------------------------------------------------- any kind of loss, a vector at a time

template <class E>
KR_FN void read_vector(const DistillationJob& job, const DistillationRow& row, const Piece& piece, int v,
                       float (&s)[kVector], float (&t)[kVector]) {
    read_shared<E>(piece.student + v * (kVector * E::size), s);
    if (job.call.soft == 0.0f) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) t[k] = 0.0f;
    } else if (job.call.indices) {
        read_shared<F32>(piece.teacher + v * (kVector * F32::size), t);
    } else {
        read_teacher<AnyDtype>(job, piece, v, t);
    }
    if (job.call.soft != 0.0f) teacher_logs(job, t);
    if (job.call.divergence == Divergence::decoupled) take_label_out<Vector>(row, piece.first + v * kVector, 0, s, t);
}

template <class E>
KR_FN void any_sums(const DistillationJob& job, const DistillationRow& row, const Piece& piece, PieceSums& out) {
    const bool hard = job.call.hard != 0.0f, logits = reads_teacher_logits(job.call);
    float s[kVector], t[kVector], tops[2] = {-INFINITY, -INFINITY};
    for (int v = piece.lane; v < piece.vectors(); v += 32) {
        read_vector<E>(job, row, piece, v, s, t);
#pragma unroll
        for (int k = 0; k < kVector; ++k) tops[0] = fmaxf(tops[0], s[k]), tops[1] = fmaxf(tops[1], t[k]);
    }
    WarpGroup<32>(piece.lane).max(tops);
    out.top = tops[0], out.top_t = tops[1];
    const float offset = offset_of(tops[0], job.exponent), offset_t = offset_of(tops[1], job.exponent);
    const float offset_1 = offset_of(tops[0], kLog2E);
    for (int v = piece.lane; v < piece.vectors(); v += 32) {
        read_vector<E>(job, row, piece, v, s, t);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
            out.sum += exp2_fast(fma(s[k], job.exponent, -offset));
            if (hard) out.sum_1 += exp2_fast(fma(s[k], kLog2E, -offset_1));
            if (logits) out.sum_t += exp2_fast(fma(t[k], job.exponent, -offset_t));
        }
    }
}

// The sums as the terms of distillation_loss_row.h want them.
[[maybe_unused]] KR_FN void state_of(const DistillationJob& job, const PieceSums& sums, RowState& state) {
    const bool logits = reads_teacher_logits(job.call);
    auto at_top = [](float sum, float top, float exponent) {
        return sum * exp2_fast(fma(-top, exponent, offset_of(top, exponent)));
    };
    state.top = sums.top, state.top_t = logits ? sums.top_t : 0.0f;
    const float all[3] = {at_top(sums.sum, sums.top, job.exponent), at_top(sums.sum_1, sums.top, kLog2E),
                          at_top(sums.sum_t, state.top_t, job.exponent)};
    set_sums(job, all, state);
}

template <class E>
KR_FN void any_terms(const DistillationJob& job, const DistillationRow& row, const RowState& state, const Piece& piece,
                     int v, float& kl, float& centred) {
    const int classes = (int)job.call.classes, first = piece.first + v * kVector;
    float s[kVector], t[kVector];
    read_vector<E>(job, row, piece, v, s, t);
    kl += soft_terms(job, state, s, t);
    if (job.call.hard != 0.0f && job.call.smoothing != 0.0f)
#pragma unroll
        for (int k = 0; k < kVector; ++k)
            if (first + k < classes) centred += s[k];
    if (!job.buffers.grad) return;
    if (row.factor != 0.0f)
        gradient<Vector>(job, row, state, first, 0, s, t);
    else
#pragma unroll
        for (int k = 0; k < kVector; ++k) s[k] = 0.0f;
    write_row<E, kVector, 1, 1>(job.buffers.grad, row.row * job.call.classes, job.grad_access, first, classes, 0, s);
}

// ---------------------------------------------------------------- what warps leave for each other

// Room for `kValues` floats of each warp of a cluster, in turns: a fast block may be one row ahead.
template <int kValues, int kWarps>
struct Exchange {
    static constexpr int kEntries = kMostBlocks * kWarps, kFloats = 2 * kValues * kEntries;
    float* room;

    KR_INLINE float* at(uint32_t turn, int value, int entry) const {
        return room + ((int)turn * kValues + value) * kEntries + entry;
    }
};

template <int kWarps>
KR_FN void add_up(const DistillationJob& job, const Exchange<5, kWarps>& exchange, uint32_t turn, int size, int rank,
                  int warp, int lane, PieceSums& sums) {
    float mine[3] = {sums.sum, sums.sum_1, sums.sum_t};
    WarpGroup<32>(lane).sum(mine);
    if (lane < size) {
        const float all[5] = {sums.top, sums.top_t, mine[0], mine[1], mine[2]};
#pragma unroll
        for (int k = 0; k < 5; ++k) write_remote(exchange.at(turn, k, rank * kWarps + warp), lane, all[k]);
    }
    cluster_arrive();
    cluster_wait();
    float tops[2] = {-INFINITY, -INFINITY};
    for (int entry = lane; entry < size * kWarps; entry += 32)
        tops[0] = fmaxf(tops[0], *exchange.at(turn, 0, entry)), tops[1] = fmaxf(tops[1], *exchange.at(turn, 1, entry));
    WarpGroup<32>(lane).max(tops);
    float all[3] = {0.0f, 0.0f, 0.0f};
    for (int entry = lane; entry < size * kWarps; entry += 32) {
        const float top = *exchange.at(turn, 0, entry), top_t = *exchange.at(turn, 1, entry);
        auto moved = [&](int value, float from, float to, float exponent) {
            const float sum = *exchange.at(turn, value, entry);
            return sum == 0.0f ? 0.0f : sum * exp2_fast(offset_of(from, exponent) - offset_of(to, exponent));
        };
        all[0] += moved(2, top, tops[0], job.exponent);
        all[1] += moved(3, top, tops[0], kLog2E);
        all[2] += moved(4, top_t, tops[1], job.exponent);
    }
    WarpGroup<32>(lane).sum(all);
    sums.top = tops[0], sums.top_t = tops[1], sums.sum = all[0], sums.sum_1 = all[1], sums.sum_t = all[2];
}

// ---------------------------------------------------------------- the kernel

template <class E, int THREADS, bool kPlain>
__global__ void __launch_bounds__(THREADS, THREADS > 256 ? 1 : 2 + kPlain)
    cluster_rows(const DistillationJob job, const ClusterPlan plan) {
#if KR_HAS_CLUSTERS
    if (has_nothing_to_do(job)) return;
    constexpr int kWarps = THREADS / 32;
    extern __shared__ uint4 shared_memory[];
    char* shared = reinterpret_cast<char*>(shared_memory);
    const DistillationLoss& call = job.call;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int rank = (int)(blockIdx.x % plan.size), classes = (int)call.classes;
    const unsigned step = gridDim.x / plan.size;
    uint64_t* arrival = reinterpret_cast<uint64_t*>(shared) + warp;
    Exchange<5, kWarps> sums_room = {reinterpret_cast<float*>(shared + 8 * kWarps)};
    Exchange<2, kWarps> terms_room = {sums_room.room + sums_room.kFloats};
    float* leader_weight = terms_room.room + terms_room.kFloats;  // not in a register of every thread

    const int first = (rank * kWarps + warp) * plan.region, left = classes - first;
    const Piece piece = {first,
                         left < 0             ? 0
                         : left < plan.region ? left
                                              : plan.region,
                         lane, shared + plan.student_at + warp * plan.region * E::size,
                         shared + plan.teacher_at + warp * plan.region * plan.target_size};
    fill_piece<E>(job, plan.region, piece);
    if (lane == 0) init_arrival(arrival);
    before_copies();
    cluster_arrive();  // all blocks are there, and so their shared memory
    cluster_wait();

    const bool leads = rank == 0 && threadIdx.x == 0;
    if (leads) *leader_weight = 0.0f;
    float loss = 0.0f;
    uint32_t turn = 0;  // of rows that are read: the parity of the copies' phase, and the room that sums are left in
    DistillationRow row = {};
    auto begin = [&](int64_t at) {
        row.row = at;
        if (at >= call.rows) return;
        __syncwarp();  // all lanes are through with what the copy overwrites
        row = row_of(job, at);
        if (row.read) fetch<E>(job, at, piece, arrival);
    };
    for (begin(blockIdx.x / plan.size); row.row < call.rows; begin(row.row + step)) {
        // The loss is linear in both sums: each thread keeps its own part, the leader adds what else there is.
        float kl = 0.0f, centred = 0.0f, base = 0.0f;
        if (row.read) {
            RowState state;
            if (!kPlain) read_label(job, row, state);
            if (piece.count > 0 && (copies_input(job) || copies_target(job))) wait_for_copies(arrival, turn);
            PieceSums sums;
            const bool alike = call.target_dtype == call.input_dtype;
            if constexpr (kPlain) {
                if (alike)
                    plain_sums<E, E>(job, piece, sums);
                else
                    plain_sums<E, AnyDtype>(job, piece, sums);
            } else {
                any_sums<E>(job, row, piece, sums);
            }
            add_up<kWarps>(job, sums_room, turn, plan.size, rank, warp, lane, sums);
            if (!kPlain || leads) state_of(job, sums, state);
            if (leads) {
                if (job.buffers.stats) store_state(job, row.row, state);
                if (kPlain) read_label(job, row, state);
                if (job.forward) base = row_loss(job, row, state, 0.0f, 0.0f);
            }
            if constexpr (kPlain) {
                const PlainRow of = plain_row(job, row, sums);
                if (alike)
                    plain_terms<E, E, false>(job, row, of, piece, lane, sums.top, kl, centred);
                else
                    plain_terms<E, AnyDtype, false>(job, row, of, piece, opaque(lane), sums.top, kl, centred);
                // The last vector if it is not whole; all of this lane's where a logit is not finite.
                int from = piece.count % kVector != 0 ? piece.vectors() - 1 : piece.vectors();
                from = from % 32 == lane ? from : piece.vectors();
                if (kl != kl) from = lane, kl = centred = 0.0f;
                if (from < piece.vectors())
                    plain_terms<E, AnyDtype, true>(job, row, of, piece, opaque(from), sums.top, kl, centred);
            } else {
                for (int v = lane; v < piece.vectors(); v += 32) any_terms<E>(job, row, state, piece, v, kl, centred);
            }
        } else if (job.buffers.grad) {
            const float zeros[kVector] = {};
            for (int v = lane; v < piece.vectors(); v += 32)
                write_row<E, kVector, 1, 1>(job.buffers.grad, row.row * call.classes, job.grad_access,
                                            piece.first + v * kVector, classes, 0, zeros);
        }
        if (job.buffers.row_loss && row.read) {
            float mine[2] = {kl, centred};
            WarpGroup<32>(lane).sum(mine);
            if (lane < 2) write_remote(terms_room.at(turn, lane, rank * kWarps + warp), 0, lane ? mine[1] : mine[0]);
            cluster_arrive();
            cluster_wait();
            kl = centred = 0.0f;
            if (rank == 0 && warp == 0) {
                float all[2] = {0.0f, 0.0f};
                for (int entry = lane; entry < plan.size * kWarps; entry += 32)
                    all[0] += *terms_room.at(turn, 0, entry), all[1] += *terms_room.at(turn, 1, entry);
                WarpGroup<32>(lane).sum(all);
                if (leads) kl = all[0], centred = all[1];
            }
        }
        if (row.read) {
            turn ^= 1u;
            const bool decoupled = call.divergence == Divergence::decoupled;
            base += call.soft * call.temperature * call.temperature * (decoupled ? call.beta * kl : kl);
            if (!decoupled && call.smoothing != 0.0f)
                base -= call.hard * (call.smoothing / (float)call.classes) * centred;
        }
        if (leads && job.forward)
            take_row(job, row, base, loss, *leader_weight);
        else
            loss += row.weight == 0.0f ? 0.0f : row.weight * base;
    }
    if (job.forward) finish_forward<THREADS>(job, loss, leads ? *leader_weight : 0.0f);
#else
    __trap();  // make_plan does not take it
#endif
}

// ---------------------------------------------------------------- launch

using Kernel = void (*)(DistillationJob, ClusterPlan);

template <class E>
Kernel kernel_of(bool plain, bool many) {
    return !plain ? cluster_rows<E, 256, false> : many ? cluster_rows<E, 512, true> : cluster_rows<E, 256, true>;
}

bool is_plain(const DistillationLoss& call) { return reads_teacher_logits(call) && call.divergence == Divergence::kl; }

Kernel kernel_for(const DistillationJob& job, const ClusterPlan& plan) {
    const bool plain = is_plain(job.call), many = plan.threads == 512;
    return job.call.input_dtype == Dtype::f32    ? kernel_of<F32>(plain, many)
           : job.call.input_dtype == Dtype::bf16 ? kernel_of<BF16>(plain, many)
                                                 : kernel_of<F16>(plain, many);
}

// Whether the kernel has a body, which it has not where the device runs what was compiled for an older one, and takes
// plans of up to `most` bytes: not of this plan's, or the plan of one thread would lower the limit under another's.
cudaError_t prepare(Kernel kernel, int most) {
    cudaFuncAttributes built = {};
    const cudaError_t status = cudaFuncGetAttributes(&built, kernel);
    if (status != cudaSuccess) return status;
    if (built.ptxVersion < 90) return cudaErrorInvalidValue;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// Launches, or, with only_ask, asks how many clusters the device takes at once.
cudaError_t launch(const DistillationJob& job, ClusterPlan& plan, cudaStream_t queue, bool only_ask = false) {
    const Kernel kernel = kernel_for(job, plan);
    const int64_t rows = job.call.rows < plan.clusters ? job.call.rows : plan.clusters;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = (unsigned)plan.size, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(plan.size * (rows < 1 ? 1 : rows))), config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = (size_t)plan.bytes, config.stream = queue;
    config.attrs = &cluster, config.numAttrs = 1;
    return only_ask ? cudaOccupancyMaxActiveClusters(&plan.clusters, kernel, &config)
                    : cudaLaunchKernelEx(&config, kernel, job, plan);
}

// Whether a slice fits; fills the plan in.
bool lay_out(const DistillationJob& job, int size, int threads, int most_bytes, ClusterPlan& plan) {
    const int warps = threads / 32, per_warp = size * warps * kVector;
    const int input_size = job.call.input_dtype == Dtype::f32 ? 4 : 2;
    plan.size = size, plan.threads = threads;
    plan.target_size = job.call.indices || job.call.target_dtype == Dtype::f32 ? 4 : 2;
    const int64_t region = (job.call.classes + per_warp - 1) / per_warp * kVector;
    const int floats = threads == 512 ? Exchange<5, 16>::kFloats + Exchange<2, 16>::kFloats
                                      : Exchange<5, 8>::kFloats + Exchange<2, 8>::kFloats;
    const int64_t before = 8 * warps + 4 * floats + 16;
    const int64_t bytes = before + region * warps * (input_size + plan.target_size);
    if (bytes > most_bytes) return false;
    plan.region = (int)region, plan.bytes = (int)bytes;
    plan.student_at = (int)before, plan.teacher_at = (int)(before + region * warps * input_size);
    return true;
}

// By how much of the device's shared memory a slice takes: three clusters to a multiprocessor, or two, or one, which
// then has twice the threads. clusters is 0 where none can run.
ClusterPlan make_plan(const DistillationJob& job, int device) {
    constexpr int kStatic = 512, kReserved = 1024 + kStatic;  // of each block: finish_forward's; that and the system's
    ClusterPlan plan = {};
    int major = 0, most = 0, all = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (major < 9) return plan;
    most -= kStatic;
    bool fits = false;
    for (int size = 1; size <= kMostBlocks && !fits; size *= 2)
        fits = lay_out(job, size, 256, all / 3 - kReserved, plan);
    fits = fits || lay_out(job, kMostBlocks, 256, all / 2 - kReserved, plan) ||
           lay_out(job, kMostBlocks, is_plain(job.call) ? 512 : 256, most, plan);
    plan.clusters = 0;
    if (!fits) return plan;
    cudaError_t status = prepare(kernel_for(job, plan), most);
    if (status == cudaSuccess) status = launch(job, plan, nullptr, true);
    if (status != cudaSuccess) {
        cudaGetLastError();
        plan.clusters = 0;
    }
    return plan;
}

std::atomic<bool> clusters_enabled{true};

// The last plan of this thread: to ask the device costs more than a small launch.
const ClusterPlan& plan_of(const DistillationJob& job) {
    struct Kept {
        int64_t classes = -1;
        int device = -1, input = -1, target = -1;
        bool plain = false;
        ClusterPlan plan = {};
    };
    static thread_local Kept kept;
    const int input = (int)job.call.input_dtype, target = job.call.indices ? -2 : (int)job.call.target_dtype;
    const bool plain = is_plain(job.call);
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) cudaGetLastError();
    if (kept.classes != job.call.classes || kept.device != device || kept.input != input || kept.target != target ||
        kept.plain != plain) {
        kept.plan = make_plan(job, device);
        kept.classes = job.call.classes, kept.device = device;
        kept.input = input, kept.target = target, kept.plain = plain;
    }
    return kept.plan;
}

}  // namespace

void distillation_loss_use_clusters(bool use) { clusters_enabled = use; }

bool clusters_hold(const DistillationJob& job) {
    return clusters_enabled && !job.from_stats && plan_of(job).clusters > 0;
}

int cluster_size(const DistillationJob& job) { return clusters_hold(job) ? plan_of(job).size : 0; }

int launch_cluster_rows(const DistillationJob& job, void* cuda_stream) {
    ClusterPlan plan = plan_of(job);
    return launch(job, plan, (cudaStream_t)cuda_stream);
}

}  // namespace cuda
}  // namespace kr
