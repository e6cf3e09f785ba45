// Stands in for the CUDA toolkit's header, so that g++ compiles csrc/cuda and tests run its kernels on a CPU. What is
// here is what those sources use; arithmetic rounds as on the device, but for approximate functions, which are exact.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static
#define __constant__ static
#define CUDART_VERSION 0

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719
};
struct cudaFuncAttributes {
    int ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
typedef void* cudaStream_t;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace cuda_host {

constexpr size_t kSharedByDefault = 48 << 10;
inline cudaError_t last_error = cudaSuccess;
inline std::map<const void*, size_t> shared_limit;

// What <<<grid, block, shared, stream>>> becomes.
struct Launch {
    dim3 grid, block;
    size_t shared;
    int cluster = 1;
    Launch(dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = nullptr)
        : grid(grid), block(block), shared(shared) {}

    template <class... Parameters, class... Arguments>
    void run(void (*kernel)(Parameters...), Arguments&&... arguments) {
        const void* key = reinterpret_cast<const void*>(kernel);
        const size_t allowed = shared_limit.count(key) ? shared_limit[key] : kSharedByDefault;
        const uint64_t threads = (uint64_t)block.x * block.y * block.z;
        if (threads < 1 || threads > kMostThreads || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFFu ||
            grid.y > 65535 || grid.z > 65535 || shared > allowed || cluster < 1 || cluster > kMostBlocks ||
            grid.x % cluster || (cluster > 1 && threads % kWarp)) {
            last_error = cudaErrorInvalidConfiguration;
            return;
        }
        std::tuple<Parameters...> values(arguments...);
        run_grid(grid, block, shared, [&] { std::apply(kernel, values); }, cluster);
        if (!machine.error.empty()) last_error = cudaErrorLaunchFailure;
    }
};

inline int current_block() { return machine.current / machine.threads; }  // of the cluster

inline char* dynamic_shared(int block = current_block()) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(machine.shared[block].data());
    return machine.shared[block].data() + (128 - at % 128) % 128;
}

// The same place in the shared memory of another block of the cluster.
template <class T>
T* mapped(T* at, unsigned rank) {
    const ptrdiff_t offset = reinterpret_cast<char*>(at) - dynamic_shared();
    if (offset < 0 || offset + sizeof(T) > machine.shared_bytes) fail("mapping of what is not dynamic shared memory");
    if ((int)rank >= machine.cluster) fail("mapping to block " + std::to_string(rank) + ", which the cluster has not,");
    return reinterpret_cast<T*>(dynamic_shared((int)rank) + offset);
}

// Copies into shared memory arrive when they are waited for, and what they will overwrite is gone at once.
struct Arrival {
    unsigned phases = 0;
    bool announced = false;
    size_t expected = 0, bytes = 0;
    std::vector<Copy> copies;
};
inline std::map<const void*, Arrival> arrivals;

inline void init_arrival(const void* barrier) { arrivals[barrier] = Arrival(); }
inline void expect_copies(const void* barrier, unsigned bytes) {
    Arrival& arrival = arrivals[barrier];
    if (arrival.announced) fail("copies announced twice in a phase");
    arrival.announced = true, arrival.expected = bytes;
}
inline void bulk_copy(void* to, const void* from, unsigned bytes, const void* barrier) {
    if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        fail("bulk copy that is not 16-byte aligned");
    std::memset(to, 0xFF, bytes);
    arrivals[barrier].copies.push_back({to, from, bytes});
    arrivals[barrier].bytes += bytes;
}
inline void wait_for_copies(const void* barrier, unsigned parity) {
    Arrival& arrival = arrivals[barrier];
    if (arrival.phases % 2 != parity) return;  // that phase is over
    if (!arrival.announced || arrival.bytes != arrival.expected)
        fail("wait for copies that were not announced or not made");
    for (const Copy& copy : arrival.copies) std::memcpy(copy.to, copy.from, copy.bytes);
    const unsigned phases = arrival.phases + 1;
    arrival = Arrival(), arrival.phases = phases;
}

// Copies of a thread into shared memory arrive when it waits for them; what they will overwrite is gone at once.
inline void copy_async(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        fail("copy that is not 16-byte aligned");
    std::memset(to, 0xFF, 16);
    machine.fibers[machine.current].copies.push_back({to, from, 16});
}
inline void wait_for_async_copies() {
    for (const Copy& copy : machine.fibers[machine.current].copies) std::memcpy(copy.to, copy.from, copy.bytes);
    machine.fibers[machine.current].copies.clear();
}

// What the lanes of a warp show each other, between two of its barriers.
struct Shown {
    const void* row;
    const uint32_t *a, *b;
};
inline std::vector<Shown> shown(kMostThreads* kMostBlocks);
inline void all_shown(const char* what, int line) { collective(Collective::ballot, {what, line}, 0xFFFFFFFFu, 0, 0); }
inline Shown& shown_by(int lane) { return shown[machine.current / kWarp * kWarp + lane]; }

inline void load_matrices(uint32_t (&to)[4], const void* row, int line) {
    const int lane = machine.current % kWarp;
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("row of a matrix that is not 16-byte aligned");
    if ((const char*)row < machine.shared[0].data() ||
        (const char*)row >= machine.shared[0].data() + machine.shared[0].size())
        fail("row of a matrix outside of shared memory");
    shown_by(lane).row = row;
    all_shown("load_matrices", line);
    for (int m = 0; m < 4; ++m) std::memcpy(&to[m], (const char*)shown_by(8 * m + lane / 4).row + lane % 4 * 4, 4);
    all_shown("load_matrices, end", line);
}

template <class Unpack>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line, Unpack unpack) {
    const int lane = machine.current % kWarp;
    const uint32_t b[2] = {b0, b1};
    shown_by(lane).a = a, shown_by(lane).b = b;
    all_shown("multiply_add", line);
    for (int c = 0; c < 4; ++c) {
        const int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
        for (int k = 0; k < 16; ++k) {
            const uint32_t left = shown_by(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
            const uint32_t right = shown_by(column * 4 + k % 8 / 2).b[k / 8];
            sum[c] += unpack(left >> k % 2 * 16 & 0xFFFFu) * unpack(right >> k % 2 * 16 & 0xFFFFu);
        }
    }
    all_shown("multiply_add, end", line);
}

template <class T>
uint64_t to_bits(T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T>
T shuffle(const char* what, int line, uint32_t mask, T value, int source) {
    const uint64_t bits = collective(Collective::shuffle, {what, line}, mask, to_bits(value), source);
    T out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline int lane() { return machine.current % kWarp; }

}  // namespace cuda_host

inline cudaError_t cudaGetLastError() {
    const cudaError_t found = cuda_host::last_error;
    cuda_host::last_error = cudaSuccess;
    return found;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? cuda_host::machine.error.c_str()
           : error == cudaSuccess          ? "no error"
                                           : "invalid configuration argument";
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || (size_t)bytes > cuda_host::machine.shared_at_most) return cudaErrorInvalidValue;
    cuda_host::shared_limit[reinterpret_cast<const void*>(kernel)] = (size_t)bytes;
    return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
    attributes->ptxVersion = cuda_host::machine.compiled_for;
    return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor             ? cuda_host::machine.compute_capability / 10
             : attribute == cudaDevAttrMultiProcessorCount              ? cuda_host::machine.processors
             : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 228 << 10
                                                                        : (int)cuda_host::machine.shared_at_most;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t*) {
    *clusters = cuda_host::machine.most_clusters;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
    *blocks = 1;
    return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    cuda_host::Launch launch(config->gridDim, config->blockDim, config->dynamicSmemBytes);
    for (unsigned k = 0; k < config->numAttrs; ++k)
        if (config->attrs[k].id == cudaLaunchAttributeClusterDimension)
            launch.cluster = (int)config->attrs[k].val.clusterDim.x;
    launch.run(kernel, arguments...);
    return cudaGetLastError();
}

// ---------------------------------------------------------------- barriers, collectives, atomics

inline void __syncthreads(int line = __builtin_LINE()) { cuda_host::barrier({"__syncthreads", line}); }
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, int line = __builtin_LINE()) {
    cuda_host::collective(cuda_host::Collective::ballot, {"__syncwarp", line}, mask, 0, 0);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
    const int lane = cuda_host::lane(), from = lane ^ bits;
    return cuda_host::shuffle("__shfl_xor_sync", line, mask, value, from / width == lane / width ? from : lane);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32, int line = __builtin_LINE()) {
    const int lane = cuda_host::lane(), from = lane + delta;
    return cuda_host::shuffle("__shfl_down_sync", line, mask, value, from / width == lane / width ? from : lane);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    const int from = cuda_host::lane() / width * width + source % width;
    return cuda_host::shuffle("__shfl_sync", line, mask, value, from);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
    return (uint32_t)cuda_host::collective(cuda_host::Collective::ballot, {"__ballot_sync", line}, mask, predicate != 0,
                                           0);
}
inline int __any_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) != 0;
}

inline void __threadfence() {}
inline unsigned atomicInc(unsigned* at, unsigned most) {
    const unsigned old = *at;
    *at = old >= most ? 0 : old + 1;
    return old;
}
template <class T>
T atomicAdd(T* at, T value) {
    const T old = *at;
    *at += value;
    return old;
}
template <class T>
T __ldg(const T* at) {
    return *at;
}
template <class T>
T __ldcg(const T* at) {
    return *at;
}

// ---------------------------------------------------------------- arithmetic

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __int2float_rn(int a) { return (float)a; }
inline float __uint2float_rn(unsigned a) { return (float)a; }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
template <class To, class From>
To cuda_host_bits(From a) {
    To out;
    static_assert(sizeof out == sizeof a, "the same bits");
    std::memcpy(&out, &a, sizeof out);
    return out;
}
inline int __float_as_int(float a) { return cuda_host_bits<int>(a); }
inline float __int_as_float(int a) { return cuda_host_bits<float>(a); }
inline unsigned __float_as_uint(float a) { return cuda_host_bits<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return cuda_host_bits<float>(a); }
