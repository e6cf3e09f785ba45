// Whether numbers are not at most 0, a bit each, `at` a multiple of the lanes; with one lane bits are 0 before they are
// written. Included after vec.h inside a namespace of foreach_isa.h; no include guard.
#if KR_LANES == 16
KR_FN void write_bits(uint8_t* bits, int64_t at, f32v a) {
    const uint16_t found = (uint16_t)_mm512_cmp_ps_mask((__m512)a, _mm512_setzero_ps(), _CMP_NLE_UQ);
    std::memcpy(bits + at / 8, &found, sizeof found);
}
KR_FN f32v where_bits(const uint8_t* bits, int64_t at, f32v a) {
    uint16_t mask;
    std::memcpy(&mask, bits + at / 8, sizeof mask);
    return (f32v)_mm512_maskz_mov_ps(mask, (__m512)a);
}
#elif KR_LANES == 8
KR_FN void write_bits(uint8_t* bits, int64_t at, f32v a) {
    bits[at / 8] = (uint8_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, _mm256_setzero_ps(), _CMP_NLE_UQ));
}
KR_FN f32v where_bits(const uint8_t* bits, int64_t at, f32v a) {
    const i32v lane = {1, 2, 4, 8, 16, 32, 64, 128};
    return as_f(as_i(a) & ((splat_i(bits[at / 8]) & lane) != 0));
}
#else
KR_FN void write_bits(uint8_t* bits, int64_t at, f32v a) { bits[at / 8] |= (uint8_t)(!(a <= 0.0f)) << at % 8; }
KR_FN f32v where_bits(const uint8_t* bits, int64_t at, f32v a) { return bits[at / 8] >> at % 8 & 1 ? a : 0.0f; }
#endif
