// Lane types and the primitives on them, for the instruction set that foreach_isa.h is compiling (KR_LANES lanes).
// GCC and clang vector extensions give + - * / & | ^ ~ << >> and comparisons; only what they lack is written here.
// With KR_LANES == 1 the types are the plain scalars and the same kernels compile to portable C++.

constexpr int kLanes = KR_LANES;
#if KR_LANES == 1
typedef float f32v;
typedef uint32_t u32v;
typedef int32_t i32v;
#else
typedef float f32v __attribute__((vector_size(4 * KR_LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * KR_LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * KR_LANES)));
#endif

KR_FN f32v splat(float a) { return a - f32v{}; }  // a - 0 keeps the sign of zero
KR_FN u32v splat_u(uint32_t a) { return a + u32v{}; }
KR_FN i32v splat_i(int32_t a) { return a + i32v{}; }
KR_FN f32v mul(f32v a, f32v b) { return a * b; }

KR_FN i32v as_i(f32v a) {
    i32v out;
    std::memcpy(&out, &a, sizeof out);
    return out;
}
KR_FN f32v as_f(i32v a) {
    f32v out;
    std::memcpy(&out, &a, sizeof out);
    return out;
}

KR_FN f32v load(const float* from) {
    f32v out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
KR_FN void store(float* to, f32v a) { std::memcpy(to, &a, sizeof a); }
#if KR_LANES > 1
KR_FN __m256i first_of_8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif
// The first n lanes of memory; the others are `fill`. n in [0, kLanes].
#if KR_LANES == 8
KR_FN f32v load_part(const float* from, int n, float fill) {
    __m256i mask = first_of_8(n);
    return (f32v)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(from, mask), _mm256_castsi256_ps(mask));
}
KR_FN void store_part(float* to, f32v a, int n) { _mm256_maskstore_ps(to, first_of_8(n), a); }
#elif KR_LANES == 16
KR_FN f32v load_part(const float* from, int n, float fill) {
    return (f32v)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1), from);
}
KR_FN void store_part(float* to, f32v a, int n) { _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1), a); }
#else
KR_FN f32v load_part(const float* from, int n, float fill) { return n > 0 ? *from : fill; }
KR_FN void store_part(float* to, f32v a, int n) {
    if (n > 0) *to = a;
}
#endif

#if KR_LANES == 1
KR_FN f32v fma(f32v a, f32v b, f32v c) { return __builtin_fmaf(a, b, c); }
KR_FN f32v sqrt(f32v a) { return __builtin_sqrtf(a); }
KR_FN f32v to_float_i(i32v a) { return (float)a; }
KR_FN f32v to_float_u(u32v a) { return (float)a; }
KR_FN f32v max(f32v a, f32v b) { return a > b ? a : b; }
KR_FN f32v min(f32v a, f32v b) { return a < b ? a : b; }
KR_FN float reduce_sum(f32v a) { return a; }
KR_FN float reduce_max(f32v a) { return a; }
KR_FN void mulhilo(u32v a, uint32_t b, u32v& hi, u32v& lo) {
    uint64_t product = (uint64_t)a * b;
    hi = (uint32_t)(product >> 32);
    lo = (uint32_t)product;
}
#else
#if KR_LANES == 8
#define KR_I(name) _mm256_##name
typedef __m256i raw_i;
#else
#define KR_I(name) _mm512_##name
typedef __m512i raw_i;
#endif
KR_FN f32v fma(f32v a, f32v b, f32v c) { return (f32v)KR_I(fmadd_ps)(a, b, c); }
KR_FN f32v sqrt(f32v a) { return (f32v)KR_I(sqrt_ps)(a); }
KR_FN f32v to_float_i(i32v a) { return (f32v)KR_I(cvtepi32_ps)((raw_i)a); }
// Halves of 16 bits are exact and the fma rounds once: the nearest float, as cvt.rn.f32.u32 gives.
KR_FN f32v to_float_u(u32v a) {
    return fma(to_float_i((i32v)(a >> 16)), splat(65536.0f), to_float_i((i32v)(a & 0xFFFFu)));
}
// As the scalar form: b where either is NaN.
KR_FN f32v max(f32v a, f32v b) { return (f32v)KR_I(max_ps)(a, b); }
KR_FN f32v min(f32v a, f32v b) { return (f32v)KR_I(min_ps)(a, b); }
KR_FN void mulhilo(u32v a, uint32_t b, u32v& hi, u32v& lo) {
    raw_i factor = (raw_i)splat_u(b), value = (raw_i)a;
    raw_i even = KR_I(mul_epu32)(value, factor);
    raw_i odd = KR_I(mul_epu32)(KR_I(srli_epi64)(value, 32), factor);
    lo = a * splat_u(b);
#if KR_LANES == 8
    hi = (u32v)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
    hi = (u32v)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#endif
}
// By halves: lanes i and i + width / 2, so that the order of additions is the same in every set of one width.
KR_FN __m128 half_sum(__m128 a) {
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_add_ss(a, _mm_movehdup_ps(a));
}
KR_FN __m128 half_max(__m128 a) {
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_max_ss(a, _mm_movehdup_ps(a));
}
#if KR_LANES == 16
KR_FN __m256 lower(f32v a) { return _mm512_castps512_ps256((__m512)a); }
KR_FN __m256 upper(f32v a) { return _mm512_extractf32x8_ps((__m512)a, 1); }
KR_FN float reduce_sum(f32v a) {
    __m256 b = _mm256_add_ps(lower(a), upper(a));
    return _mm_cvtss_f32(half_sum(_mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1))));
}
KR_FN float reduce_max(f32v a) {
    __m256 b = _mm256_max_ps(lower(a), upper(a));
    return _mm_cvtss_f32(half_max(_mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1))));
}
#else
KR_FN float reduce_sum(f32v a) {
    return _mm_cvtss_f32(half_sum(_mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1))));
}
KR_FN float reduce_max(f32v a) {
    return _mm_cvtss_f32(half_max(_mm_max_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1))));
}
#endif
#undef KR_I
#endif

#include "common/log_polynomial.h"
