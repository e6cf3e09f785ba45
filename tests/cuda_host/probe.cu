// Kernels that are right, and kernels with a fault each, to test the fibers themselves. Called through ctypes.
#include <cuda_runtime.h>

namespace {

// out[i] = sum over the block: shuffles, shared memory and a barrier
__global__ void block_sum(const float* in, float* out) {
    extern __shared__ float parts[];
    float sum = in[blockIdx.x * blockDim.x + threadIdx.x];
    for (int k = 16; k; k /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, k);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    float all = 0;
    for (unsigned k = 0; k < blockDim.x / 32; ++k) all += parts[k];
    if (threadIdx.x == 0) out[blockIdx.x] = all;
}

__global__ void without_barrier(float* out) {
    __shared__ float shared[64];
    shared[threadIdx.x] = (float)threadIdx.x;
    out[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void fault(int kind, float* out) {
    float value = 1.0f;
    if (kind == 0 && threadIdx.x < 7) __syncthreads();                      // the others leave: fine
    if (kind == 1 && threadIdx.x < 7) value = __shfl_xor_sync(~0u, value, 1);  // the others leave
    if (kind == 2) {
        if (threadIdx.x % 2)
            __syncwarp();
        else
            value = __shfl_xor_sync(~0u, value, 1);
    }
    if (kind == 3) {
        if (threadIdx.x < 32) __syncthreads();
        __syncwarp();
        if (threadIdx.x >= 32) __syncthreads();
    }
    if (kind == 4 && threadIdx.x < 16) value = __shfl_sync(0xFFFFu, value, 20);
    if (kind == 5 && threadIdx.x < 16) __syncwarp(0xFFFF0000u);
    if (kind == 6 && threadIdx.x == 0) {
        while (true) __syncwarp();
    }
    if (kind == 6) __syncthreads();
    out[threadIdx.x] = value;
}

}  // namespace

#define KR_EXPORT extern "C" __attribute__((visibility("default")))

KR_EXPORT int probe_sum(const float* in, float* out, int blocks, int threads, int shared) {
    block_sum<<<blocks, threads, shared>>>(in, out);
    return cudaGetLastError();
}
KR_EXPORT int probe_race(float* out, bool descending) {
    cuda_host::machine.descending = descending;
    without_barrier<<<1, 64>>>(out);
    return cudaGetLastError();
}
KR_EXPORT int probe_fault(int kind, float* out) {
    fault<<<1, 64>>>(kind, out);
    return cudaGetLastError();
}
KR_EXPORT const char* probe_error() { return cudaGetErrorString(cudaErrorLaunchFailure); }
