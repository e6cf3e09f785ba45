// Included once per instruction set by philox_normal.cpp.
#include "common/philox.h"

// Fills out[begin, end) of one image's normals. begin is a multiple of 4.
static void normals_of_image(uint64_t id, uint64_t seed, uint32_t stream, int64_t begin, int64_t end, float* out) {
    u32v lane = u32v{};
#if KR_LANES > 1
    for (int i = 0; i < kLanes; ++i) lane[i] = (uint32_t)i;
#endif
    const u32v stream_v = splat_u(stream), lo = splat_u((uint32_t)id), hi = splat_u((uint32_t)(id >> 32));
    const uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int64_t at = begin; at < end; at += 4 * kLanes) {
        f32v z[4];
        philox_normal4(splat_u((uint32_t)(at / 4)) + lane, stream_v, lo, hi, k0, k1, z);
        float block[4 * kLanes];
        float* to = end - at >= 4 * kLanes ? out + at : block;
#if KR_LANES == 8
        // Lane g of z[k] is element 4 g + k: a 4 x 8 transpose, within 128-bit halves and then across them.
        __m256 a = _mm256_unpacklo_ps(z[0], z[1]), b = _mm256_unpackhi_ps(z[0], z[1]);
        __m256 c = _mm256_unpacklo_ps(z[2], z[3]), d = _mm256_unpackhi_ps(z[2], z[3]);
        __m256 r0 = _mm256_shuffle_ps(a, c, 0x44), r1 = _mm256_shuffle_ps(a, c, 0xEE);
        __m256 r2 = _mm256_shuffle_ps(b, d, 0x44), r3 = _mm256_shuffle_ps(b, d, 0xEE);
        _mm256_storeu_ps(to, _mm256_permute2f128_ps(r0, r1, 0x20));
        _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(r2, r3, 0x20));
        _mm256_storeu_ps(to + 16, _mm256_permute2f128_ps(r0, r1, 0x31));
        _mm256_storeu_ps(to + 24, _mm256_permute2f128_ps(r2, r3, 0x31));
#else
        for (int k = 0; k < 4; ++k) {
            float lanes[kLanes];
            store(lanes, z[k]);
            for (int g = 0; g < kLanes; ++g) to[4 * g + k] = lanes[g];
        }
#endif
        if (to == block)
            for (int64_t i = 0; i < end - at; ++i) out[at + i] = block[i];
    }
}
