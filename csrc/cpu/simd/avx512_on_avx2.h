// AVX-512 by AVX2: the intrinsics that the C++ kernels use, so that their 16-lane forms run on a machine without it.
//
// With KR_EMULATE_AVX512 (`make avx512`) foreach_isa.h includes this and compiles the namespace kr::avx512 for AVX2.
// Lanes, orders of additions and roundings are those of the hardware; speed is not. What chooses its instructions by
// itself (crc32.cpp) stays as it is.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstring>

#define KR_EMULATED static inline __attribute__((always_inline, target("avx2,fma,f16c")))

namespace emulated {

template <typename To, typename From>
KR_EMULATED To bits(const From& from, int byte = 0) {
    To to;
    std::memcpy(&to, reinterpret_cast<const char*>(&from) + byte, sizeof to);
    return to;
}
template <typename To, typename Half>
KR_EMULATED To join(const Half& low, const Half& high) {
    static_assert(sizeof(To) == 2 * sizeof(Half), "two halves");
    To to;
    std::memcpy(&to, &low, sizeof low);
    std::memcpy(reinterpret_cast<char*>(&to) + sizeof low, &high, sizeof high);
    return to;
}
KR_EMULATED __m256 low(__m512 a) { return bits<__m256>(a); }
KR_EMULATED __m256 high(__m512 a) { return bits<__m256>(a, 32); }
KR_EMULATED __m256i low(__m512i a) { return bits<__m256i>(a); }
KR_EMULATED __m256i high(__m512i a) { return bits<__m256i>(a, 32); }
KR_EMULATED __m256d low(__m512d a) { return bits<__m256d>(a); }
KR_EMULATED __m256d high(__m512d a) { return bits<__m256d>(a, 32); }

// ---------------------------------------------------------------- both halves alike

#define KR_BY_HALVES_1(name, type, from) \
    KR_EMULATED type name(from a) { return join<type>(_mm256_##name(low(a)), _mm256_##name(high(a))); }
#define KR_BY_HALVES_2(name, type)                                                         \
    KR_EMULATED type name(type a, type b) {                                                \
        return join<type>(_mm256_##name(low(a), low(b)), _mm256_##name(high(a), high(b))); \
    }
#define KR_BY_HALVES_3(name, type)                                                                          \
    KR_EMULATED type name(type a, type b, type c) {                                                         \
        return join<type>(_mm256_##name(low(a), low(b), low(c)), _mm256_##name(high(a), high(b), high(c))); \
    }
KR_BY_HALVES_1(sqrt_ps, __m512, __m512)
KR_BY_HALVES_1(cvtepi32_ps, __m512, __m512i)
KR_BY_HALVES_2(max_ps, __m512)
KR_BY_HALVES_2(min_ps, __m512)
KR_BY_HALVES_2(unpacklo_ps, __m512)
KR_BY_HALVES_2(unpackhi_ps, __m512)
KR_BY_HALVES_2(mul_epu32, __m512i)
KR_BY_HALVES_2(madd_epi16, __m512i)
KR_BY_HALVES_2(maddubs_epi16, __m512i)
KR_BY_HALVES_2(sad_epu8, __m512i)
KR_BY_HALVES_3(fmadd_ps, __m512)
KR_BY_HALVES_3(fmadd_pd, __m512d)
KR_EMULATED __m512i srli_epi64(__m512i a, unsigned count) {
    return join<__m512i>(_mm256_srli_epi64(low(a), (int)count), _mm256_srli_epi64(high(a), (int)count));
}

// ---------------------------------------------------------------- constants, memory, halves

KR_EMULATED __m512 setzero_ps() { return __m512{}; }
KR_EMULATED __m512i setzero_si512() { return __m512i{}; }
KR_EMULATED __m512 set1_ps(float a) { return join<__m512>(_mm256_set1_ps(a), _mm256_set1_ps(a)); }
KR_EMULATED __m512d set1_pd(double a) { return join<__m512d>(_mm256_set1_pd(a), _mm256_set1_pd(a)); }
KR_EMULATED __m512i set1_epi16(short a) { return join<__m512i>(_mm256_set1_epi16(a), _mm256_set1_epi16(a)); }
template <typename... Lanes>
KR_EMULATED __m512i setr_epi32(Lanes... lanes) {
    static_assert(sizeof...(lanes) == 16, "16 lanes");
    const int each[16] = {lanes...};
    return bits<__m512i>(each);
}
KR_EMULATED __m512 loadu_ps(const float* from) { return bits<__m512>(*from); }
KR_EMULATED void storeu_ps(float* to, __m512 a) { std::memcpy(to, &a, sizeof a); }
KR_EMULATED __m512 castps256_ps512(__m256 a) { return join<__m512>(a, __m256{}); }
KR_EMULATED __m256 castps512_ps256(__m512 a) { return low(a); }
KR_EMULATED __m512 castpd_ps(__m512d a) { return bits<__m512>(a); }
KR_EMULATED __m256 extractf32x8_ps(__m512 a, int half) { return half ? high(a) : low(a); }
KR_EMULATED __m512 insertf32x8(__m512 a, __m256 b, int half) {
    return half ? join<__m512>(low(a), b) : join<__m512>(b, high(a));
}
KR_EMULATED __m128 extractf32x4_ps(__m512 a, int quarter) { return bits<__m128>(a, 16 * quarter); }

// ---------------------------------------------------------------- masks: lanes that are off touch no memory

KR_EMULATED __m512 mask_loadu_ps(__m512 a, __mmask16 mask, const float* from) {
    float out[16];
    std::memcpy(out, &a, sizeof out);
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) out[i] = from[i];
    return bits<__m512>(out);
}
KR_EMULATED void mask_storeu_ps(float* to, __mmask16 mask, __m512 a) {
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) to[i] = a[i];
}
KR_EMULATED __m512d maskz_loadu_pd(__mmask8 mask, const double* from) {
    double out[8] = {};
    for (int i = 0; i < 8; ++i)
        if (mask >> i & 1) out[i] = from[i];
    return bits<__m512d>(out);
}
KR_EMULATED __m512 maskz_mov_ps(__mmask16 mask, __m512 a) {
    float out[16];
    for (int i = 0; i < 16; ++i) out[i] = mask >> i & 1 ? a[i] : 0.0f;
    return bits<__m512>(out);
}
KR_EMULATED __m512i mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
    int out[16];
    for (int i = 0; i < 16; ++i) out[i] = bits<int>(mask >> i & 1 ? b : a, 4 * i);
    return bits<__m512i>(out);
}

// ---------------------------------------------------------------- lanes across

KR_EMULATED __m512 permutexvar_ps(__m512i at, __m512 a) {
    float out[16];
    for (int i = 0; i < 16; ++i) out[i] = a[bits<int>(at, 4 * i) & 15];
    return bits<__m512>(out);
}
KR_EMULATED __m512 permutex2var_ps(__m512 a, __m512i at, __m512 b) {
    float out[16];
    for (int i = 0; i < 16; ++i) {
        const int lane = bits<int>(at, 4 * i) & 31;
        out[i] = lane < 16 ? a[lane] : b[lane - 16];
    }
    return bits<__m512>(out);
}

// ---------------------------------------------------------------- conversions

KR_EMULATED __m512d cvtps_pd(__m256 a) {
    return join<__m512d>(_mm256_cvtps_pd(bits<__m128>(a)), _mm256_cvtps_pd(bits<__m128>(a, 16)));
}
KR_EMULATED __m256 cvtpd_ps(__m512d a) { return join<__m256>(_mm256_cvtpd_ps(low(a)), _mm256_cvtpd_ps(high(a))); }
KR_EMULATED __m512 cvtph_ps(__m256i a) {
    return join<__m512>(_mm256_cvtph_ps(bits<__m128i>(a)), _mm256_cvtph_ps(bits<__m128i>(a, 16)));
}
KR_EMULATED __m256i cvtps_ph_nearest(__m512 a) {
    return join<__m256i>(_mm256_cvtps_ph(low(a), 0), _mm256_cvtps_ph(high(a), 0));
}
KR_EMULATED __m512i cvtepu16_epi32(__m256i a) {
    return join<__m512i>(_mm256_cvtepu16_epi32(bits<__m128i>(a)), _mm256_cvtepu16_epi32(bits<__m128i>(a, 16)));
}
KR_EMULATED __m256i cvtepi32_epi16(__m512i a) {  // the low 16 bits of each
    short out[16];
    for (int i = 0; i < 16; ++i) out[i] = (short)bits<int>(a, 4 * i);
    return bits<__m256i>(out);
}
// a 2^floor(b), rounded once.
KR_EMULATED __m512 scalef_ps(__m512 a, __m512 b) {
    float out[16];
    for (int i = 0; i < 16; ++i) {
        const double power = b[i] != b[i] ? b[i] : std::exp2(std::floor(std::fmin(std::fmax(b[i], -1000.0f), 1000.0f)));
        out[i] = (float)(a[i] * power);
    }
    return bits<__m512>(out);
}

}  // namespace emulated

// ---------------------------------------------------------------- the names that the kernels use

#undef _mm512_setr_epi32
#define _mm512_sqrt_ps emulated::sqrt_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_unpacklo_ps emulated::unpacklo_ps
#define _mm512_unpackhi_ps emulated::unpackhi_ps
#define _mm512_mul_epu32 emulated::mul_epu32
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_maddubs_epi16 emulated::maddubs_epi16
#define _mm512_sad_epu8 emulated::sad_epu8
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_fmadd_pd emulated::fmadd_pd
#define _mm512_srli_epi64 emulated::srli_epi64
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_pd emulated::set1_pd
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_castps256_ps512 emulated::castps256_ps512
#define _mm512_castps512_ps256 emulated::castps512_ps256
#define _mm512_castpd_ps emulated::castpd_ps
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#undef _mm512_insertf32x8
#define _mm512_insertf32x8 emulated::insertf32x8
#undef _mm512_extractf32x4_ps
#define _mm512_extractf32x4_ps emulated::extractf32x4_ps
#define _mm512_mask_loadu_ps emulated::mask_loadu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm512_maskz_loadu_pd emulated::maskz_loadu_pd
#define _mm512_maskz_mov_ps emulated::maskz_mov_ps
#define _mm512_mask_blend_epi32 emulated::mask_blend_epi32
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#define _mm512_permutex2var_ps emulated::permutex2var_ps
#define _mm512_cvtps_pd emulated::cvtps_pd
#define _mm512_cvtpd_ps emulated::cvtpd_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) emulated::cvtps_ph_nearest(a)
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_scalef_ps emulated::scalef_ps
// Those with a constant of the instruction are macros as in the compiler's own header without optimization.
#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps(a, b, lanes)                                                   \
    emulated::join<__m512>(_mm256_shuffle_ps(emulated::low(a), emulated::low(b), lanes), \
                           _mm256_shuffle_ps(emulated::high(a), emulated::high(b), lanes))
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(a, rounding)                                         \
    emulated::join<__m512>(_mm256_round_ps(emulated::low((__m512)(a)), rounding), \
                           _mm256_round_ps(emulated::high((__m512)(a)), rounding))
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, how)                                                                  \
    (__mmask16)(_mm256_movemask_ps(_mm256_cmp_ps(emulated::low((__m512)(a)), emulated::low(b), how)) | \
                _mm256_movemask_ps(_mm256_cmp_ps(emulated::high((__m512)(a)), emulated::high(b), how)) << 8)
