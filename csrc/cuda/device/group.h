// Who holds a row of a tensor: some lanes of a warp, or a block. Reductions over them, each result in every lane.
#pragma once
#include <cuda_runtime.h>

#include "cuda/device/lane.h"

namespace kr {
namespace cuda {

// Lanes of a group in one warp, 1 to 32. Lanes of other groups of the warp may be elsewhere.
template <int LANES>
struct WarpGroup {
    static constexpr int lanes = LANES;
    int lane;
    uint32_t mask;

    KR_INLINE explicit WarpGroup(int thread) : lane(thread % LANES) {
        mask = LANES == 32 ? 0xFFFFFFFFu : ((1u << (LANES % 32)) - 1u) << (thread % 32 / LANES * LANES);
    }
    template <int N>
    KR_INLINE void max(float (&x)[N]) {
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2)
#pragma unroll
            for (int k = 0; k < N; ++k) x[k] = fmaxf(x[k], __shfl_xor_sync(mask, x[k], step));
    }
    template <int N>
    KR_INLINE void sum(float (&x)[N]) {
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2)
#pragma unroll
            for (int k = 0; k < N; ++k) x[k] += __shfl_xor_sync(mask, x[k], step);
    }
};

// All threads of a block. Two rows of scratch in turn, so that one barrier a reduction is enough.
template <int THREADS>
struct BlockGroup {
    static constexpr int lanes = THREADS, kWarps = THREADS / 32, kMost = 4;
    int lane, turn = 0;

    KR_INLINE explicit BlockGroup(int thread) : lane(thread) {}
    template <int N>
    KR_INLINE void max(float (&x)[N]) {
        WarpGroup<32>(lane).max(x);
        const float* parts = share(x);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            x[k] = parts[k * kWarps];
            for (int w = 1; w < kWarps; ++w) x[k] = fmaxf(x[k], parts[k * kWarps + w]);
        }
    }
    template <int N>
    KR_INLINE void sum(float (&x)[N]) {
        WarpGroup<32>(lane).sum(x);
        const float* parts = share(x);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            x[k] = parts[k * kWarps];
            for (int w = 1; w < kWarps; ++w) x[k] += parts[k * kWarps + w];
        }
    }

  private:
    template <int N>
    KR_INLINE const float* share(const float (&x)[N]) {
        static_assert(N <= kMost, "scratch");
        __shared__ float scratch[2][kMost * kWarps];
        float* to = scratch[turn];
        turn ^= 1;
        if (lane % 32 == 0)
#pragma unroll
            for (int k = 0; k < N; ++k) to[k * kWarps + lane / 32] = x[k];
        __syncthreads();
        return to;
    }
};

}  // namespace cuda
}  // namespace kr
