// kLanes elements of any element type as f32v, for the instruction set that foreach_isa.h is compiling. After vec.h; no
// include guard. The half types are the bits of common/dtype.h under a name of their own, so that kernels can be
// templates on the element type.

struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

KR_FN f32v load_as(const float* from) { return load(from); }
KR_FN void store_as(float* to, f32v a) { store(to, a); }

#if KR_LANES == 1
KR_FN f32v load_as(const Bf16* from) { return bf16_to_float(from->bits); }
KR_FN f32v load_as(const F16* from) { return half_to_float(from->bits); }
KR_FN void store_as(Bf16* to, f32v a) { to->bits = float_to_bf16(a); }
KR_FN void store_as(F16* to, f32v a) { to->bits = float_to_half(a); }
#else
#if KR_LANES == 8
KR_FN __m128i load_half(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
KR_FN i32v widen(__m128i a) { return (i32v)_mm256_cvtepu16_epi32(a); }
KR_FN f32v load_as(const F16* from) { return (f32v)_mm256_cvtph_ps(load_half(from)); }
KR_FN void store_as(F16* to, f32v a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)a, 0));
}
KR_FN void store_low(void* to, i32v a) {
    const __m256i packed = _mm256_packus_epi32((__m256i)a, (__m256i)a);  // 16 bits a lane, by halves of 128 bits
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
#else
KR_FN __m256i load_half(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
KR_FN i32v widen(__m256i a) { return (i32v)_mm512_cvtepu16_epi32(a); }
KR_FN f32v load_as(const F16* from) { return (f32v)_mm512_cvtph_ps(load_half(from)); }
KR_FN void store_as(F16* to, f32v a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)a, 0));
}
KR_FN void store_low(void* to, i32v a) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)a));
}
#endif
KR_FN f32v load_as(const Bf16* from) { return as_f(widen(load_half(from)) << 16); }
KR_FN void store_as(Bf16* to, f32v a) {
    const u32v bits = (u32v)as_i(a), rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    store_low(to, a == a ? (i32v)rounded : splat_i(0x7FC0));
}
#endif

// One element.
KR_FN float to_float(float a) { return a; }
KR_FN float to_float(Bf16 a) { return bf16_to_float(a.bits); }
KR_FN float to_float(F16 a) { return half_to_float(a.bits); }
KR_FN void from_float(float* to, float a) { *to = a; }
KR_FN void from_float(Bf16* to, float a) { to->bits = float_to_bf16(a); }
KR_FN void from_float(F16* to, float a) { to->bits = float_to_half(a); }

// The first n lanes; the others are 0.
KR_FN f32v load_as_part(const float* from, int n) { return load_part(from, n, 0.0f); }
KR_FN void store_as_part(float* to, f32v a, int n) { store_part(to, a, n); }
template <class T>
KR_FN f32v load_as_part(const T* from, int n) {
    T whole[kLanes] = {};
    for (int k = 0; k < n; ++k) whole[k] = from[k];
    return load_as(whole);
}
template <class T>
KR_FN void store_as_part(T* to, f32v a, int n) {
    T whole[kLanes];
    store_as(whole, a);
    for (int k = 0; k < n; ++k) to[k] = whole[k];
}
