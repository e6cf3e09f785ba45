#include "cuda/sampling/philox_normal.h"

#include <cuda_runtime.h>

#include "cuda/device/lane.h"
#include "cuda/device/launch.h"

namespace kr {
namespace cuda {
namespace {

#include "common/sampling/philox.h"

// One thread per counter, so four normals and, where the row is aligned, one 16-byte store. Writes are the only
// traffic.
__global__ void normals(const int64_t* __restrict__ ids, int64_t count, int64_t numel, int64_t groups, uint32_t k0,
                        uint32_t k1, uint32_t stream, float* __restrict__ out) {
    const int64_t total = count * groups, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; item < total; item += step) {
        const int64_t image = item / groups, group = item % groups;
        const uint64_t id = (uint64_t)ids[image];
        float z[4];
        philox_normal4((uint32_t)group, stream, (uint32_t)id, (uint32_t)(id >> 32), k0, k1, z);
        float* to = out + image * numel + 4 * group;
        if (numel % 4 == 0) {
            *reinterpret_cast<float4*>(to) = make_float4(z[0], z[1], z[2], z[3]);
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (4 * group + k < numel) to[k] = z[k];
        }
    }
}

}  // namespace

int philox_normal(const int64_t* ids, int64_t count, int64_t numel, uint64_t seed, uint32_t stream_id, float* out,
                  void* cuda_stream) {
    const int64_t groups = (numel + 3) / 4, total = count * groups;
    if (total == 0) return cudaSuccess;
    const int threads = 256;
    normals<<<grid_of((total + threads - 1) / threads, kMostBlocks), threads, 0, (cudaStream_t)cuda_stream>>>(
        ids, count, numel, groups, (uint32_t)seed, (uint32_t)(seed >> 32), stream_id, out);
    return cudaGetLastError();
}

}  // namespace cuda
}  // namespace kr
