// Thread-block clusters, their shared memory, and copies into it that run beside the threads: each one PTX instruction.
// They need compute capability 9.0: a kernel that uses them has its body within KR_HAS_CLUSTERS.
#pragma once
#include <cuda_runtime.h>

#include "cuda/device/lane.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define KR_HAS_CLUSTERS 1
#else
#define KR_HAS_CLUSTERS 0
#endif

namespace kr {
namespace cuda {

#ifdef __CUDACC__

KR_FN uint32_t shared_address(const void* at) { return (uint32_t)__cvta_generic_to_shared(at); }

// What is written before arriving, here or in another block's shared memory, is seen by all after waiting.
KR_FN void cluster_arrive() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
KR_FN void cluster_wait() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes to `at`, an address in dynamic shared memory, in block `rank` of the cluster.
KR_FN void write_remote(float* at, uint32_t rank, float value) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(at)), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}

// A barrier in shared memory that copies arrive at; its phases are waited for by their parity.
KR_FN void init_arrival(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// What this thread, and threads that it has met since, did to shared memory comes before the copies that it starts
// later: reads too, of what a copy overwrites, because copies access memory through a proxy of their own.
KR_FN void before_overwriting() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for barriers that were set up.
KR_FN void before_copies() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    before_overwriting();
}
KR_FN void expect_copies(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Addresses and bytes are multiples of 16.
KR_FN void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
KR_FN void wait_for_copies(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

#else

KR_FN void cluster_arrive(int line = __builtin_LINE()) { cuda_host::cluster_arrive({"cluster_arrive", line}); }
KR_FN void cluster_wait(int line = __builtin_LINE()) { cuda_host::cluster_wait({"cluster_wait", line}); }
KR_FN void write_remote(float* at, uint32_t rank, float value) { *cuda_host::mapped(at, rank) = value; }
KR_FN void init_arrival(uint64_t* barrier) { cuda_host::init_arrival(barrier); }
KR_FN void before_overwriting() {}
KR_FN void before_copies() {}
KR_FN void expect_copies(uint64_t* barrier, uint32_t bytes) { cuda_host::expect_copies(barrier, bytes); }
KR_FN void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    cuda_host::bulk_copy(to, from, bytes, barrier);
}
KR_FN void wait_for_copies(uint64_t* barrier, uint32_t parity) { cuda_host::wait_for_copies(barrier, parity); }

#endif

}  // namespace cuda
}  // namespace kr
