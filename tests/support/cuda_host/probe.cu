// Kernels that are right, and kernels with a fault each, to test the fibers themselves. Called through ctypes.
#include <cuda_runtime.h>

#include "cuda/device/cluster.h"

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
    if (kind == 0 && threadIdx.x < 7) __syncthreads();                         // the others leave: fine
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

// out[block] = sum over the cluster of in[block]: each block writes into the shared memory of all, `rows` times
__global__ void cluster_sum(const float* in, float* out, unsigned size, int rows) {
    extern __shared__ float room[];  // [2][size]
    const unsigned rank = blockIdx.x % size;
    float sum = 0;
    for (int row = 0; row < rows; ++row) {
        float* here = room + row % 2 * size;
        if (threadIdx.x < size) kr::cuda::write_remote(here + rank, threadIdx.x, in[blockIdx.x] + (float)row);
        kr::cuda::cluster_arrive();
        kr::cuda::cluster_wait();
        sum = 0;
        for (unsigned k = 0; k < size; ++k) sum += here[k];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// out = in by way of shared memory, a copy of 16 bytes a round; with a fault each from kind 1 on
__global__ void bulk(int kind, const float* in, float* out, int rounds) {
    extern __shared__ float room[];
    uint64_t* arrival = reinterpret_cast<uint64_t*>(room + 16);
    if (threadIdx.x == 0) kr::cuda::init_arrival(arrival);
    __syncthreads();
    for (int round = 0; round < rounds; ++round) {
        if (threadIdx.x == 0) {
            kr::cuda::expect_copies(arrival, kind == 3 ? 32 : 16);
            kr::cuda::bulk_copy(room + (kind == 1), in + 4 * round, 16, arrival);
            if (kind == 4) kr::cuda::expect_copies(arrival, 16);
        }
        __syncwarp();
        if (kind != 2) kr::cuda::wait_for_copies(arrival, round % 2);
        if (threadIdx.x < 4) out[4 * round + threadIdx.x] = room[threadIdx.x];
        __syncwarp();
    }
}

__global__ void cluster_fault(int kind, float* out) {
    extern __shared__ float room[];
    static float elsewhere;
    if (kind == 0 && blockIdx.x == 1) return;  // who has left is not waited for
    if (kind == 1) kr::cuda::cluster_arrive(), kr::cuda::cluster_arrive();
    if (kind == 2) kr::cuda::cluster_wait();
    if (kind == 3) kr::cuda::write_remote(&elsewhere, 1, 0.0f);
    if (kind == 4) kr::cuda::write_remote(room, 2, 0.0f);
    if (kind == 5 && blockIdx.x == 1 && threadIdx.x >= 32)
        for (;;) __syncthreads();  // the other warp waits for the cluster
    kr::cuda::cluster_arrive();
    kr::cuda::cluster_wait();
    if (threadIdx.x == 0) out[blockIdx.x] = 1.0f;
}

template <class... Parameters, class... Arguments>
int launch_cluster(void (*kernel)(Parameters...), int blocks, int size, int threads, Arguments... arguments) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension, attribute.val.clusterDim = {(unsigned)size, 1, 1};
    cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), 256, nullptr, &attribute, 1};
    return cudaLaunchKernelEx(&config, kernel, arguments...);
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
KR_EXPORT int probe_cluster(const float* in, float* out, int blocks, int size, int threads, int rows, bool descending) {
    cuda_host::machine.descending = descending;
    return launch_cluster(cluster_sum, blocks, size, threads, in, out, (unsigned)size, rows);
}
KR_EXPORT int probe_cluster_fault(int kind, float* out) { return launch_cluster(cluster_fault, 2, 2, 64, kind, out); }
KR_EXPORT int probe_bulk(int kind, const float* in, float* out, int rounds) {
    bulk<<<1, 32, 128>>>(kind, in, out, rounds);
    return cudaGetLastError();
}
KR_EXPORT const char* probe_error() { return cudaGetErrorString(cudaErrorLaunchFailure); }
