// The lane primitives of common/sampling for one CUDA thread: IEEE roundings spelled out, so
// that no compiler flag can contract a product into a sum.
#pragma once
#include <cstdint>

#include "common/numbers.h"

#define KR_FN static __device__ __forceinline__
#define KR_INLINE __device__ __forceinline__
#define KR_UNROLL _Pragma("unroll")

namespace kr {
namespace cuda {

typedef float f32v;
typedef uint32_t u32v;
typedef int32_t i32v;

// The same number, of which the compiler knows nothing: what follows from it is then computed where it is used, instead
// of being kept in registers through a loop.
KR_FN int opaque(int a) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(a));
#endif
    return a;
}

KR_FN f32v splat(float a) { return a; }
KR_FN u32v splat_u(uint32_t a) { return a; }
KR_FN f32v mul(f32v a, f32v b) { return __fmul_rn(a, b); }
KR_FN f32v fma(f32v a, f32v b, f32v c) { return __fmaf_rn(a, b, c); }
KR_FN f32v sqrt(f32v a) { return __fsqrt_rn(a); }
KR_FN f32v to_float_i(i32v a) { return __int2float_rn(a); }
KR_FN f32v to_float_u(u32v a) { return __uint2float_rn(a); }
KR_FN i32v as_i(f32v a) { return __float_as_int(a); }
KR_FN f32v as_f(i32v a) { return __int_as_float(a); }
KR_FN void mulhilo(u32v a, uint32_t b, u32v& hi, u32v& lo) {
    hi = __umulhi(a, b);
    lo = a * b;
}

#include "common/log_polynomial.h"

}  // namespace cuda
}  // namespace kr
