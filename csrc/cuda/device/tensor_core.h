// Tensor cores as one warp sees them: products of 16 x 16 by 16 x 8 halves, loads of their operands from shared memory,
// and asynchronous copies into shared memory. They need compute capability 8.0: a kernel that uses them has its body
// within KR_HAS_TENSOR_CORES.
#pragma once
#include <cuda_runtime.h>

#include "common/dtype.h"
#include "cuda/device/lane.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define KR_HAS_TENSOR_CORES 1
#else
#define KR_HAS_TENSOR_CORES 0
#endif

namespace kr {
namespace cuda {

// A word is two halves, the lower bits first. kBf16: bfloat16, else float16.

#ifdef __CUDACC__

// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix
// the word l % 4 of row l / 4.
KR_FN void load_matrices(uint32_t (&to)[4], const void* row) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}

// sum[r][n] += sum_k a[r][k] b[k][n]. With g = lane / 4, q = lane % 4: a holds, at columns 2 q and 2 q + 1, row g,
// row g + 8, and both again 8 columns on; b holds rows 2 q, 2 q + 1 of column g, and those 8 on; sum holds row g,
// columns 2 q and 2 q + 1, and those of row g + 8.
template <bool kBf16>
KR_FN void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (kBf16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <bool kBf16>
KR_FN uint32_t pack(float low, float high) {
    uint32_t out;
    if (kBf16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

template <bool kBf16>
KR_FN float unpack(uint32_t half) {
    float out;
    if (kBf16)
        out = __uint_as_float(half << 16);
    else
        asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"((uint16_t)half));
    return out;
}

// The larger of each half; NaN stays.
template <bool kBf16>
KR_FN uint32_t max_of_halves(uint32_t a, uint32_t b) {
    uint32_t out;
    if (kBf16)
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    else
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

// 16 bytes, both addresses multiples of 16; there when this thread has waited, and for others after a barrier.
KR_FN void copy_async(uint4* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from)
                 : "memory");
}
KR_FN void wait_for_async_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The line of memory at `from` is likely to be read soon.
KR_FN void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

#else

KR_FN void load_matrices(uint32_t (&to)[4], const void* row, int line = __builtin_LINE()) {
    cuda_host::load_matrices(to, row, line);
}
template <bool kBf16>
KR_FN float unpack(uint32_t half) {
    return kBf16 ? bf16_to_float((uint16_t)half) : half_to_float((uint16_t)half);
}
template <bool kBf16>
KR_FN void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        int line = __builtin_LINE()) {
    cuda_host::multiply_add(sum, a, b0, b1, line, [](uint32_t half) { return unpack<kBf16>(half); });
}
template <bool kBf16>
KR_FN uint32_t pack(float low, float high) {
    return kBf16 ? float_to_bf16(low) | (uint32_t)float_to_bf16(high) << 16
                 : float_to_half(low) | (uint32_t)float_to_half(high) << 16;
}
template <bool kBf16>
KR_FN uint32_t max_of_halves(uint32_t a, uint32_t b) {
    auto larger = [](float x, float y) { return x <= y ? y : x; };
    return pack<kBf16>(larger(unpack<kBf16>(a), unpack<kBf16>(b)),
                       larger(unpack<kBf16>(a >> 16), unpack<kBf16>(b >> 16)));
}
KR_FN void copy_async(uint4* to, const void* from) { cuda_host::copy_async(to, from); }
KR_FN void wait_for_async_copies() { cuda_host::wait_for_async_copies(); }
KR_FN void prefetch(const void*) {}

#endif

}  // namespace cuda
}  // namespace kr
