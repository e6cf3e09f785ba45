// Included once per instruction set by encode_png.cpp.

// Adler-32 (RFC 1950): a = 1 + sum of the bytes, b = sum of all values of a, both modulo 65521. Over n bytes that is
// a += sum x_i and b += n a_before + sum (n - i) x_i, so vectors of kBytes bytes need one multiply-add each.

#if KR_LANES == 1
constexpr int kBytes = 16;
#else
constexpr int kBytes = 4 * KR_LANES;
#if KR_LANES == 8
typedef __m256i raw_bytes;
#define KR_B(name) _mm256_##name
#else
typedef __m512i raw_bytes;
#define KR_B(name) _mm512_##name
#endif
KR_FN uint64_t sum_of(u32v lanes) {
    uint32_t each[kLanes];
    std::memcpy(each, &lanes, sizeof each);
    uint64_t total = 0;
    for (int i = 0; i < kLanes; ++i) total += each[i];
    return total;
}
#endif

static uint32_t adler32(uint32_t adler, const uint8_t* data, int64_t size) {
    // Lanes of 32 bits: after n vectors of 64 bytes, `before` holds at most 8 * 255 n^2 / 2, so n = 1024 is far below
    // 2^32; the scalar sums have at most 16 bytes a step and 64 bits.
    constexpr int64_t kVectors = 1024;
    uint64_t a = adler & 0xFFFF, b = adler >> 16;
    while (size >= kBytes) {
        const int64_t vectors = size / kBytes < kVectors ? size / kBytes : kVectors;
#if KR_LANES == 1
        uint64_t s = 0, before = 0, weighted = 0;
        for (int64_t v = 0; v < vectors; ++v) {
            before += s;
            uint32_t plain = 0, ramp = 0;
            for (int i = 0; i < kBytes; ++i) {
                plain += data[v * kBytes + i];
                ramp += (uint32_t)(kBytes - i) * data[v * kBytes + i];
            }
            s += plain;
            weighted += ramp;
        }
#else
        alignas(64) int8_t ramp[kBytes];
        for (int i = 0; i < kBytes; ++i) ramp[i] = (int8_t)(kBytes - i);
        raw_bytes weights, ones = KR_B(set1_epi16)(1);
        std::memcpy(&weights, ramp, sizeof weights);
        u32v sums = {}, befores = {}, weighteds = {};
        for (int64_t v = 0; v < vectors; ++v) {
            raw_bytes x;
            std::memcpy(&x, data + v * kBytes, sizeof x);
            befores += sums;
#if KR_LANES == 8
            sums += (u32v)_mm256_sad_epu8(x, _mm256_setzero_si256());
#else
            sums += (u32v)_mm512_sad_epu8(x, _mm512_setzero_si512());
#endif
            // Two products of 255 and at most 64 and 63 fit into 16 bits.
            weighteds += (u32v)KR_B(madd_epi16)(KR_B(maddubs_epi16)(x, weights), ones);
        }
        const uint64_t s = sum_of(sums), before = sum_of(befores), weighted = sum_of(weighteds);
#endif
        b = (b + (uint64_t)(vectors * kBytes) * a + (uint64_t)kBytes * before + weighted) % 65521;
        a = (a + s) % 65521;
        data += vectors * kBytes;
        size -= vectors * kBytes;
    }
    for (; size; ++data, --size) {
        a += *data;
        b += a;
    }
    return (uint32_t)(b % 65521 << 16 | a % 65521);
}
#undef KR_B
