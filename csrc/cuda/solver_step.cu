#include "cuda/solver_step.h"

#include <cuda_runtime.h>

#include "cuda/lane.h"

namespace kr {
namespace cuda {
namespace {

#include "common/philox.h"
#include "common/solver_row.h"

struct Inputs {
    const float *x, *cond, *uncond;
    const int64_t* ids;
    const float* history[4];
};

// One thread per four elements of an image: one Philox counter, and 16-byte accesses where rows are aligned.
template <bool kAligned>
__global__ void step(Inputs in, SolverRow row, uint32_t k0, uint32_t k1, uint32_t stream, int64_t batch, int64_t numel,
                     int64_t groups, float* __restrict__ y) {
    const int64_t total = batch * groups, stride = (int64_t)gridDim.x * blockDim.x;
    for (int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; item < total; item += stride) {
        const int64_t image = item / groups, group = item % groups, at = image * numel + 4 * group;
        const int count = kAligned ? 4 : (int)(numel - 4 * group < 4 ? numel - 4 * group : 4);
        auto read = [&](const float* from, float (&to)[4]) {
            if (kAligned) {
                const float4 v = *reinterpret_cast<const float4*>(from + at);
                to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
            } else {
#pragma unroll
                for (int k = 0; k < 4; ++k) to[k] = k < count ? from[at + k] : 0.0f;
            }
        };
        float x[4], e[4], other[4], out[4];
        read(in.x, x);
        read(in.cond, e);
        if (in.uncond) {
            read(in.uncond, other);
#pragma unroll
            for (int k = 0; k < 4; ++k) e[k] = guided(e[k], other[k], row.guidance);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) out[k] = solver_terms(row, row.x0 != 0.0f, x[k], e[k]);
#pragma unroll
        for (int term = 0; term < 4; ++term) {
            if (term < row.terms) {
                read(in.history[term], other);
#pragma unroll
                for (int k = 0; k < 4; ++k) out[k] = fma(row.history[term], other[k], out[k]);
            }
        }
        if (row.noise != 0.0f) {
            const uint64_t id = (uint64_t)in.ids[image];
            philox_normal4((uint32_t)group, stream, (uint32_t)id, (uint32_t)(id >> 32), k0, k1, other);
#pragma unroll
            for (int k = 0; k < 4; ++k) out[k] = fma(row.noise, other[k], out[k]);
        }
        if (kAligned) {
            *reinterpret_cast<float4*>(y + at) = make_float4(out[0], out[1], out[2], out[3]);
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (k < count) y[at + k] = out[k];
        }
    }
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

int solver_step(const float* x, const float* cond, const float* uncond, const int64_t* ids,
                const float* const* history, int terms, const float* row, float guidance, uint64_t seed,
                uint32_t stream_id, int64_t batch, int64_t numel, float* y, void* cuda_stream) {
    const int64_t groups = (numel + 3) / 4, total = batch * groups;
    if (total == 0) return cudaSuccess;
    SolverRow filled = {row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], {0, 0, 0, 0}, guidance, terms};
    Inputs in = {x, cond, uncond, ids, {nullptr, nullptr, nullptr, nullptr}};
    bool vector = numel % 4 == 0 && aligned(x) && aligned(cond) && aligned(uncond) && aligned(y);
    for (int k = 0; k < terms; ++k) {
        filled.history[k] = row[8 + k];
        in.history[k] = history[k];
        vector = vector && aligned(history[k]);
    }
    const int threads = 256;
    const int64_t wanted = (total + threads - 1) / threads, most = 1 << 16;
    const unsigned blocks = (unsigned)(wanted < most ? wanted : most);
    const uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    auto queue = (cudaStream_t)cuda_stream;
    if (vector)
        step<true><<<blocks, threads, 0, queue>>>(in, filled, k0, k1, stream_id, batch, numel, groups, y);
    else
        step<false><<<blocks, threads, 0, queue>>>(in, filled, k0, k1, stream_id, batch, numel, groups, y);
    return cudaGetLastError();
}

}  // namespace cuda
}  // namespace kr
