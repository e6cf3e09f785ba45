// LiRA for all targets at once, a warp an example. It loads the shadows' values and keep bits of one query, puts the
// values in and the values out apart in shared memory, finds the three middle order statistics of each side, and scores
// every target in float64 from them and from two sums (common/lira.h). Queries follow each other, so each score is
// summed in one place and in one order.
//
// Values are kept as integers of the same order. The one of rank h is the largest v with at most h values below it:
// 32 counts by ballot, one for each bit, instead of a sort.
#include "cuda/membership/lira.h"

#include <cuda_runtime.h>

#include "cuda/device/lane.h"

namespace kr {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xFFFFFFFFu;

KR_FN uint32_t key_of(float value) {
    const uint32_t bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
KR_FN float value_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

KR_FN double warp_sum(double a) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) a += __shfl_xor_sync(kAll, a, step);
    return a;
}

// The values on one side, in shared memory: keys[0 .. count) in any order.
struct Keys {
    const uint32_t* keys;
    int count, lane;

    KR_INLINE double operator()(int64_t i) const { return value_of(keys[i]); }

    KR_INLINE int below(uint32_t key) const {
        int smaller = 0;
        for (int start = 0; start < count; start += kWarp) {
            const int i = start + lane;
            smaller += __popc(__ballot_sync(kAll, i < count && keys[i] < key));
        }
        return smaller;
    }

    KR_INLINE LiraSide side() const {
        LiraSide out = {count, 0, 0, 0, 0, 0};
        if (count == 0) return out;
        const int rank = count / 2;
        uint32_t middle = 0;
#pragma unroll 1
        for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1)
            if (below(middle | bit) <= rank) middle |= bit;
        // Its neighbours: the same value again, or the nearest other one.
        const int smaller = below(middle), up_to = below(middle + 1);
        uint32_t low = 0, high = kAll;
        out.middle = value_of(middle);
        for (int i = lane; i < count; i += kWarp) {
            const uint32_t key = keys[i];
            if (key < middle && key > low) low = key;
            if (key > middle && key < high) high = key;
            const double d = value_of(key) - out.middle;
            out.sum += d, out.square += d * d;
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            const uint32_t other_low = __shfl_xor_sync(kAll, low, step), other_high = __shfl_xor_sync(kAll, high, step);
            low = other_low > low ? other_low : low, high = other_high < high ? other_high : high;
        }
        out.low = smaller < rank ? out.middle : value_of(low);
        out.high = up_to > rank + 1 ? out.middle : value_of(high);
        if (rank == 0) out.low = 0;
        if (rank + 1 >= count) out.high = 0;
        out.sum = warp_sum(out.sum), out.square = warp_sum(out.square);
        return out;
    }
};

// One (query, example): the sides and what is left of them for a target.
struct Shadows {
    Keys in, out;
    LiraSide side_in, side_out;
    LiraStats all_in, all_out;

    // keys: shared memory for all models; keep: those of the example.
    KR_INLINE Shadows(const Lira& call, const float* row, const uint8_t* keep, uint32_t* keys) {
        const int models = (int)call.models, lane = (int)threadIdx.x;
        int held = 0, others = 0;
        __syncwarp();  // the keys of the query before are no longer read
        for (int start = 0; start < models; start += kWarp) {
            const int m = start + lane;
            const bool inside = m < models && keep[m], outside = m < models && !inside;
            const uint32_t key = m < models ? key_of(row[m]) : 0u;
            const uint32_t ins = __ballot_sync(kAll, inside), outs = __ballot_sync(kAll, outside);
            const uint32_t before = (1u << lane) - 1u;
            if (inside) keys[held + __popc(ins & before)] = key;
            if (outside) keys[models - 1 - others - __popc(outs & before)] = key;  // from the end
            held += __popc(ins), others += __popc(outs);
        }
        __syncwarp();
        in = {keys, held, lane}, out = {keys + held, others, lane};
        side_in = in.side(), side_out = out.side();
        all_in = lira_all(side_in), all_out = lira_all(side_out);
    }

    // Sides of the target with value x that is in or out itself.
    KR_INLINE void without(float x, bool inside, LiraStats& stats_in, LiraStats& stats_out) const {
        stats_in = all_in, stats_out = all_out;
        if (inside)
            stats_in = lira_without(side_in, x, in);
        else
            stats_out = lira_without(side_out, x, out);
    }
};

__global__ void __launch_bounds__(kWarp) pool_shadows(const Lira call, double* __restrict__ partial) {
    extern __shared__ double shared[];
    const bool raw = call.variance == Variance::fixed_raw;
    const int models = (int)call.models, targets = call.target ? 1 : models, lane = (int)threadIdx.x;
    double* sums = shared;  // [targets, 2 sides, 2]; a lane adds to those of its own targets only
    uint32_t* keys = reinterpret_cast<uint32_t*>(sums + 4 * targets);
    for (int k = lane; k < targets; k += kWarp)
#pragma unroll
        for (int part = 0; part < 4; ++part) sums[4 * k + part] = 0;
    for (int64_t n = blockIdx.x; n < call.examples; n += gridDim.x) {
        const uint8_t* keep = call.keep + n * models;
        for (int64_t a = 0; a < call.queries; ++a) {
            const float* row = call.phi + (a * call.examples + n) * models;
            const Shadows shadows(call, row, keep, keys);
            for (int k = lane; k < targets; k += kWarp) {
                LiraStats in = shadows.all_in, out = shadows.all_out;
                if (!call.target) shadows.without(row[k], keep[k], in, out);
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const LiraStats& each = side ? out : in;
                    const double count = (double)each.count;
                    double* to = sums + 4 * k + 2 * side;
                    to[0] += raw ? count * each.mean : each.residual;
                    if (raw) to[1] += count * (each.variance + each.mean * each.mean);
                }
            }
        }
    }
    for (int k = lane; k < targets; k += kWarp)
#pragma unroll
        for (int part = 0; part < 4; ++part)
            partial[((int64_t)blockIdx.x * targets + k) * 4 + part] = sums[4 * k + part];
}

__global__ void __launch_bounds__(kWarp) score_targets(const Lira call, const LiraBuffers buffers) {
    extern __shared__ double shared[];
    const LiraRule rule = {call.online, call.variance, buffers.constant};
    const double* __restrict__ pooled = buffers.pooled;
    double* __restrict__ scores = call.scores;
    const int models = (int)call.models, targets = (int)call.targets, lane = (int)threadIdx.x;
    double* sums = shared;  // of a target's scores over the queries
    uint32_t* keys = reinterpret_cast<uint32_t*>(sums + targets);
    unsigned long long few = 0;
    for (int64_t n = blockIdx.x; n < call.examples; n += gridDim.x) {
        const uint8_t* keep = call.keep + n * models;
        for (int64_t a = 0; a < call.queries; ++a) {
            const int64_t at = a * call.examples + n;
            const float* row = call.phi + at * models;
            const Shadows shadows(call, row, keep, keys);
            for (int k = lane; k < targets; k += kWarp) {
                LiraStats in = shadows.all_in, out = shadows.all_out;
                const float x = call.target ? call.target[at * targets + k] : row[k];
                if (!call.target) shadows.without(x, keep[k], in, out);
                double score = 0;
                if (rule.lacks(in, out)) {
                    few += a == 0;
                } else {
                    const double* own = pooled ? pooled + (call.target ? 0 : 2 * k) : nullptr;
                    score = rule.score(x, in, out, own ? own[0] : 0, own ? own[1] : 0);
                }
                sums[k] = a == 0 ? score : sums[k] + score;
            }
        }
        for (int k = lane; k < targets; k += kWarp) scores[k * call.examples + n] = sums[k] / (double)call.queries;
    }
    if (few) atomicAdd(buffers.num_unscored, few);
}

}  // namespace

int lira_pool(const Lira& call, double* partial, void* cuda_stream) {
    if (call.examples == 0) return cudaSuccess;
    const int64_t targets = call.target ? 1 : call.models;
    const size_t bytes = (size_t)(4 * targets) * sizeof(double) + (size_t)call.models * sizeof(uint32_t);
    pool_shadows<<<(unsigned)lira_blocks(call.examples), kWarp, bytes, (cudaStream_t)cuda_stream>>>(call, partial);
    return cudaGetLastError();
}

int lira(const Lira& call, const LiraBuffers& buffers, void* cuda_stream) {
    if (call.examples * call.targets == 0) return cudaSuccess;
    const size_t bytes = (size_t)call.targets * sizeof(double) + (size_t)call.models * sizeof(uint32_t);
    const int64_t blocks = call.examples < (1 << 16) ? call.examples : 1 << 16;
    score_targets<<<(unsigned)blocks, kWarp, bytes, (cudaStream_t)cuda_stream>>>(call, buffers);
    return cudaGetLastError();
}

}  // namespace cuda
}  // namespace kr
