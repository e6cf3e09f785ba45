// Normals of one image by blocks, for the instruction set that foreach_isa.h is compiling: the same bits as
// philox_normal4 of common/philox.h, which is the definition. Include after it.
//
// Three passes over a block that stays in L1: the Philox words, the radii, the angles. One counter is a chain of ten
// multiplications that wait for each other and then of two polynomials, longer than an out-of-order window; apart,
// the rounds of two vectors are interleaved by hand and the polynomials of several overlap by themselves.

constexpr int kBlockVectors = 16;                           // of counters; even
constexpr int kBlockElements = 4 * kLanes * kBlockVectors;  // 2 KiB of words with AVX2

#if KR_LANES == 1
KR_FN void philox_vectors(uint64_t group, uint32_t stream, uint64_t id, uint64_t seed, int vectors,
                          u32v words[kBlockVectors][4]) {
    for (int v = 0; v < vectors; ++v) {
        Words each = philox((uint32_t)(group + v), stream, (uint32_t)id, (uint32_t)(id >> 32), (uint32_t)seed,
                            (uint32_t)(seed >> 32));
        for (int k = 0; k < 4; ++k) words[v][k] = each.w[k];
    }
}
#else
typedef uint64_t u64v __attribute__((vector_size(4 * KR_LANES)));

// A 32-bit word of the counter sits in the low half of a 64-bit lane; the high half is never looked at. So the
// product needs no shuffle: its low half is where it has to be, and its high half comes by one shift.
#if KR_LANES == 8
KR_FN u64v product(u64v a, u64v b) { return (u64v)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
KR_FN u32v low_halves(u64v a, u64v b) { return (u32v)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88); }
#else
KR_FN u64v product(u64v a, u64v b) { return (u64v)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
KR_FN u32v low_halves(u64v a, u64v b) { return (u32v)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88); }
#endif
KR_FN u64v splat_64(uint64_t a) { return a + u64v{}; }

// words[v][k][lane] = word k of counter (group + kLanes v + lane, stream, id). Only c0 differs between lanes, so
// of the first two rounds half is the same in all lanes and done once.
KR_FN void philox_vectors(uint64_t group, uint32_t stream, uint64_t id, uint64_t seed, int vectors,
                          u32v words[kBlockVectors][4]) {
    constexpr uint32_t m0 = 0xD2511F53u, m1 = 0xCD9E8D57u, bump0 = 0x9E3779B9u, bump1 = 0xBB67AE85u;
    const uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    const u64v factor0 = splat_64(m0), factor1 = splat_64(m1);
    const uint64_t first = (uint64_t)(uint32_t)id * m1;                              // round 1
    const uint64_t second = (uint64_t)((uint32_t)(first >> 32) ^ stream ^ k0) * m0;  // round 2
    const u64v mask2 = splat_64((uint32_t)(id >> 32) ^ k1);                          // makes c2 of round 1
    const u64v mask0 = splat_64((uint32_t)first ^ (k0 + bump0));                     // makes c0 of round 2
    const u64v next2 = splat_64((uint32_t)(second >> 32) ^ (k1 + bump1)), next3 = splat_64((uint32_t)second);
    // low_halves(a, b) interleaves pairs within 128 bits, so a starts with groups 0 1 4 5 ... and b with 2 3 6 7 ...
    u64v part = u64v{};
    for (int i = 0; i < kLanes / 2; ++i) part[i] = (uint64_t)(i % 2 + i / 2 * 4);
    for (int v = 0; v < vectors; v += 2) {
        u64v c0[4], c1[4], c2[4], c3[4];
        KR_UNROLL
        for (int j = 0; j < 4; ++j) {
            const u64v p0 = product(splat_64(group + kLanes * (v + j / 2) + j % 2 * 2) + part, factor0);
            const u64v p1 = product((p0 >> 32) ^ mask2, factor1);
            c0[j] = (p1 >> 32) ^ mask0;
            c1[j] = p1;
            c2[j] = p0 ^ next2;
            c3[j] = next3;
        }
        KR_UNROLL
        for (uint32_t round = 2; round < 10; ++round) {
            const u64v key0 = splat_64((uint32_t)(k0 + round * bump0)), key1 = splat_64((uint32_t)(k1 + round * bump1));
            KR_UNROLL
            for (int j = 0; j < 4; ++j) {
                const u64v p0 = product(c0[j], factor0), p1 = product(c2[j], factor1);
                c0[j] = (p1 >> 32) ^ (c1[j] ^ key0);
                c2[j] = (p0 >> 32) ^ (c3[j] ^ key1);
                c1[j] = p1;
                c3[j] = p0;
            }
        }
        KR_UNROLL
        for (int j = 0; j < 2; ++j) {
            words[v + j][0] = low_halves(c0[2 * j], c0[2 * j + 1]);
            words[v + j][1] = low_halves(c1[2 * j], c1[2 * j + 1]);
            words[v + j][2] = low_halves(c2[2 * j], c2[2 * j + 1]);
            words[v + j][3] = low_halves(c3[2 * j], c3[2 * j + 1]);
        }
    }
}
#endif

// Lane g of z[k] goes to to[4 g + k].
KR_FN void store_normals(const f32v z[4], float* to) {
#if KR_LANES == 1
    for (int k = 0; k < 4; ++k) to[k] = z[k];
#else
#if KR_LANES == 8
    const __m256 a = _mm256_unpacklo_ps(z[0], z[1]), b = _mm256_unpackhi_ps(z[0], z[1]);
    const __m256 c = _mm256_unpacklo_ps(z[2], z[3]), d = _mm256_unpackhi_ps(z[2], z[3]);
    const __m256 row[4] = {_mm256_shuffle_ps(a, c, 0x44), _mm256_shuffle_ps(a, c, 0xEE), _mm256_shuffle_ps(b, d, 0x44),
                           _mm256_shuffle_ps(b, d, 0xEE)};
#define KR_QUARTER(k, q) _mm256_extractf128_ps(row[k], q)
#else
    const __m512 a = _mm512_unpacklo_ps(z[0], z[1]), b = _mm512_unpackhi_ps(z[0], z[1]);
    const __m512 c = _mm512_unpacklo_ps(z[2], z[3]), d = _mm512_unpackhi_ps(z[2], z[3]);
    const __m512 row[4] = {_mm512_shuffle_ps(a, c, 0x44), _mm512_shuffle_ps(a, c, 0xEE), _mm512_shuffle_ps(b, d, 0x44),
                           _mm512_shuffle_ps(b, d, 0xEE)};
#define KR_QUARTER(k, q) _mm512_extractf32x4_ps(row[k], q)
#endif
    // row[k] holds, in its 128-bit part q, the four normals of lane 4 q + k.
#define KR_STORE(q) \
    for (int k = 0; k < 4; ++k) _mm_storeu_ps(to + 16 * q + 4 * k, KR_QUARTER(k, q));
    KR_STORE(0)
    KR_STORE(1)
#if KR_LANES == 16
    KR_STORE(2)
    KR_STORE(3)
#endif
#undef KR_STORE
#undef KR_QUARTER
#endif
}

// out[0, count) = the normals begin, begin + 1, ... of image `id`; begin is a multiple of 4, count <= kBlockElements.
KR_FN void normal_block(uint64_t id, uint64_t seed, uint32_t stream, int64_t begin, int count, float* out) {
    constexpr int step = 4 * kLanes;
    u32v words[kBlockVectors][4];
    const int vectors = (count + step - 1) / step;
    philox_vectors((uint64_t)begin / 4, stream, id, seed, vectors, words);
    for (int v = 0; v < vectors; ++v)
        for (int k = 0; k < 4; k += 2) words[v][k] = (u32v)as_i(normal_radius(words[v][k]));
    for (int v = 0; v < vectors; ++v) {
        const int left = count - v * step;
        f32v z[4];
        for (int k = 0; k < 4; k += 2) normal_pair(as_f((i32v)words[v][k]), words[v][k + 1], z + k);
        if (left >= step) {
            store_normals(z, out + v * step);
        } else {
            float tail[step];
            store_normals(z, tail);
            for (int i = 0; i < left; ++i) out[v * step + i] = tail[i];
        }
    }
}
