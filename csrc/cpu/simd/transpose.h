// Square blocks of numbers, for the instruction set that foreach_isa.h is compiling. After vec.h; no include guard.
#if KR_LANES > 1
// Lanes of a and b in turn: the lower halves, the upper halves.
KR_FN f32v interleave_lower(f32v a, f32v b) {
#if KR_LANES == 16
    const __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return (f32v)_mm512_permutex2var_ps((__m512)a, at, (__m512)b);
#else
    return (f32v)_mm256_permute2f128_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b),
                                        _mm256_unpackhi_ps((__m256)a, (__m256)b), 0x20);
#endif
}
KR_FN f32v interleave_upper(f32v a, f32v b) {
#if KR_LANES == 16
    const __m512i at = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return (f32v)_mm512_permutex2var_ps((__m512)a, at, (__m512)b);
#else
    return (f32v)_mm256_permute2f128_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b),
                                        _mm256_unpackhi_ps((__m256)a, (__m256)b), 0x31);
#endif
}
#endif

// m[i][j] and m[j][i] change places. Interleaving row r with row r + lanes / 2 turns the bits of a place (row, lane)
// by one; after as many times as a lane has bits, row and lane have changed places.
#if KR_LANES > 1
KR_FN void transpose(f32v (&m)[kLanes]) {
    KR_UNROLL for (int bits = 1; bits < kLanes; bits *= 2) {
        f32v turned[kLanes];
        KR_UNROLL for (int r = 0; r < kLanes / 2; ++r) {
            turned[2 * r] = interleave_lower(m[r], m[r + kLanes / 2]);
            turned[2 * r + 1] = interleave_upper(m[r], m[r + kLanes / 2]);
        }
        KR_UNROLL for (int r = 0; r < kLanes; ++r) m[r] = turned[r];
    }
}
#else
KR_FN void transpose(f32v (&)[1]) {}
#endif
