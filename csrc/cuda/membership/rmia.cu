// RMIA: a binary search with the exact predicate, which holds for a prefix of the sorted z. One query needs no more.
// For a vote, z is dominated by x in query a iff its rank (how many z are smaller) is below x's count, so N Z A
// comparisons of integers remain: a thread holds one x and the votes of 32 z in registers, whose ranks lie in shared
// memory and are read by all threads at once. No matrix: a block adds its majorities to the counts.
#include "cuda/membership/rmia.h"

#include <cuda_runtime.h>

#include "cuda/device/lane.h"

namespace kr {
namespace cuda {
namespace {

constexpr int kThreads = 256, kTile = 32, kQueries = 64;
constexpr int64_t kVoteBlocks = 2048;

template <class T>
__global__ void __launch_bounds__(kThreads)
    search(const T* __restrict__ x, const T* __restrict__ ordered, int64_t total, int64_t num_x, int64_t num_z, T gamma,
           Predicate predicate, int32_t* __restrict__ below) {
    const int64_t step = (int64_t)gridDim.x * kThreads;
    for (int64_t at = (int64_t)blockIdx.x * kThreads + threadIdx.x; at < total; at += step) {
        const T value = x[at];
        const T* z = ordered + at / num_x * num_z;
        int64_t low = 0, high = num_z;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (dominates(value, z[middle], gamma, predicate))
                low = middle + 1;
            else
                high = middle;
        }
        below[at] = (int32_t)low;
    }
}

__global__ void __launch_bounds__(kThreads)
    vote(const int32_t* __restrict__ below, const int32_t* __restrict__ rank, int64_t queries, int64_t num_x,
         int64_t num_z, int64_t per_block, unsigned long long* count) {
    __shared__ int4 tile[kQueries][kTile / 4];
    const int64_t n = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    const bool live = n < num_x;
    const int64_t first_z = (int64_t)blockIdx.y * per_block;
    const int64_t last_z = first_z + per_block < num_z ? first_z + per_block : num_z;
    unsigned majorities = 0;
    for (int64_t start = first_z; start < last_z; start += kTile) {
        int votes[kTile];
#pragma unroll
        for (int k = 0; k < kTile; ++k) votes[k] = 0;
        for (int64_t first = 0; first < queries; first += kQueries) {
            const int held = (int)(queries - first < kQueries ? queries - first : kQueries);
            __syncthreads();
            int* to = reinterpret_cast<int*>(tile);
            for (int each = (int)threadIdx.x; each < held * kTile; each += kThreads) {
                const int64_t z = start + each % kTile;
                to[each] = z < last_z ? rank[(first + each / kTile) * num_z + z] : 0x7FFFFFFF;  // never a vote
            }
            __syncthreads();
            for (int a = 0; a < held; ++a) {
                const int limit = live ? below[(first + a) * num_x + n] : 0;
#pragma unroll
                for (int k = 0; k < kTile / 4; ++k) {
                    const int4 ranks = tile[a][k];
                    votes[4 * k] += ranks.x < limit, votes[4 * k + 1] += ranks.y < limit;
                    votes[4 * k + 2] += ranks.z < limit, votes[4 * k + 3] += ranks.w < limit;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < kTile; ++k) majorities += 2 * votes[k] > (int)queries;
    }
    if (live && majorities) atomicAdd(count + n, (unsigned long long)majorities);
}

template <class T>
void search_all(const Rmia& call, int32_t* below, cudaStream_t queue) {
    const int64_t total = call.queries * call.num_x, blocks = (total + kThreads - 1) / kThreads;
    const unsigned grid = (unsigned)(blocks < 1 << 16 ? blocks : 1 << 16);
    const auto *x = static_cast<const T*>(call.x), *z = static_cast<const T*>(call.z);
    search<T><<<grid, kThreads, 0, queue>>>(x, z, total, call.num_x, call.num_z, (T)call.gamma, call.predicate, below);
}

}  // namespace

int rmia_below(const Rmia& call, int32_t* below, void* cuda_stream) {
    if (call.queries * call.num_x == 0) return cudaSuccess;
    auto run = call.float64 ? search_all<double> : search_all<float>;
    run(call, below, (cudaStream_t)cuda_stream);
    return cudaGetLastError();
}

int rmia_vote(const Rmia& call, const int32_t* below, const int32_t* rank, unsigned long long* count,
              void* cuda_stream) {
    const int64_t queries = call.queries, num_x = call.num_x, num_z = call.num_z;
    if (num_x == 0) return cudaSuccess;
    const int64_t across = (num_x + kThreads - 1) / kThreads, tiles = (num_z + kTile - 1) / kTile;
    // The z are split up where the x alone are too few blocks.
    const int64_t parts = across < kVoteBlocks ? (kVoteBlocks + across - 1) / across : 1;
    const int64_t per_part = (tiles + parts - 1) / parts, needed = (tiles + per_part - 1) / per_part;
    const dim3 grid((unsigned)across, (unsigned)needed);
    vote<<<grid, kThreads, 0, (cudaStream_t)cuda_stream>>>(below, rank, queries, num_x, num_z, per_part * kTile, count);
    return cudaGetLastError();
}

}  // namespace cuda
}  // namespace kr
