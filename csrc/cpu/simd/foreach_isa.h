// Compiles the file named by KR_KERNEL once per instruction set, each time in a namespace of its own
// (kr::scalar, kr::avx2, kr::avx512) with the lane types of vec.h. No include guard on purpose: a translation unit
// may define KR_KERNEL and include this file several times.
//
// The kernels are compiled under a target pragma and not in separate files with -mavx512f: inline functions of the
// standard library would then exist in an AVX-512 copy too, and the linker might hand that copy to an older CPU.
// Include every standard header before this file, and call no standard template from a kernel's hot loop.
#include <cstring>

#include "common/dtype.h"
#include "common/numbers.h"
#include "cpu/simd/isa.h"
#if KR_X86
#include <immintrin.h>
#endif
#if defined(KR_EMULATE_AVX512)
#include "cpu/simd/avx512_on_avx2.h"
#endif

#define KR_FN static inline __attribute__((always_inline))
#define KR_UNROLL _Pragma("GCC unroll 16")

#define KR_LANES 1
namespace kr {
namespace scalar {
#include "cpu/simd/vec.h"
#include KR_KERNEL
}  // namespace scalar
}  // namespace kr
#undef KR_LANES

#if KR_X86
#define KR_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace kr {
namespace avx2 {
#include "cpu/simd/vec.h"
#include KR_KERNEL
}  // namespace avx2
}  // namespace kr
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef KR_LANES

#define KR_LANES 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#if defined(KR_EMULATE_AVX512)
#pragma GCC target("avx2,fma,f16c")
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#endif
namespace kr {
namespace avx512 {
#include "cpu/simd/vec.h"
#include KR_KERNEL
}  // namespace avx512
}  // namespace kr
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef KR_LANES
#endif

#undef KR_FN
#undef KR_UNROLL
#undef KR_KERNEL
