// CRC-32 by folding: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel,
// 2009). A message is a polynomial over GF(2); 128 bits of it may be replaced by any 128 bits congruent to it modulo P.
// So X(x) x^D, the block X that stands D bits before another, is added to that other block as two 64 x 64 products with
// x^(D+32) mod P and x^(D-32) mod P. What is left at the end is 16 bytes, which a table reduces.
#include "cpu/sampling/crc32.h"

#include "cpu/simd/isa.h"
#if KR_X86
#include <immintrin.h>
#endif

namespace kr {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320;  // bit 31 - k stands for x^k

constexpr uint32_t times_x(uint32_t r) { return (r >> 1) ^ (r & 1 ? kPolynomial : 0); }

// x^n mod P. One place to the left, because the product of two reflected factors comes out one place to the right.
constexpr uint64_t fold_constant(int n) {
    uint32_t r = 0x80000000;
    for (int i = 0; i < n; ++i) r = times_x(r);
    return static_cast<uint64_t>(r) << 1;
}

// table[k][b]: what byte b adds to the remainder when k more bytes follow it.
struct Tables {
    uint32_t of[16][256];
    constexpr Tables() : of() {
        for (uint32_t b = 0; b < 256; ++b) {
            uint32_t r = b;
            for (int i = 0; i < 8; ++i) r = times_x(r);
            of[0][b] = r;
        }
        for (int k = 1; k < 16; ++k)
            for (uint32_t b = 0; b < 256; ++b) of[k][b] = (of[k - 1][b] >> 8) ^ of[0][of[k - 1][b] & 0xFF];
    }
};
constexpr Tables kTables;

// Slicing by 16. `r` is the remainder without the complement at either end.
uint32_t by_tables(uint32_t r, const uint8_t* data, size_t size) {
    const auto& of = kTables.of;
    for (; size >= 16; data += 16, size -= 16) {
        uint32_t next = 0;
        for (int i = 0; i < 4; ++i) next ^= of[15 - i][data[i] ^ (r >> (8 * i) & 0xFF)];
        for (int i = 4; i < 16; ++i) next ^= of[15 - i][data[i]];
        r = next;
    }
    for (; size; ++data, --size) r = (r >> 8) ^ of[0][(r ^ *data) & 0xFF];
    return r;
}

#if KR_X86
constexpr long long kHigh2048 = fold_constant(2048 - 32), kLow2048 = fold_constant(2048 + 32);
constexpr long long kHigh512 = fold_constant(512 - 32), kLow512 = fold_constant(512 + 32);
constexpr long long kHigh128 = fold_constant(128 - 32), kLow128 = fold_constant(128 + 32);

#define KR_CLMUL __attribute__((target("pclmul,sse4.1")))
#define KR_VCLMUL __attribute__((target("vpclmulqdq,pclmul,avx512f,avx512vl,avx512dq")))

KR_CLMUL inline __m128i load16(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

KR_CLMUL inline __m128i fold(__m128i x, __m128i k, __m128i next) {
    __m128i low = _mm_clmulepi64_si128(x, k, 0x00), high = _mm_clmulepi64_si128(x, k, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// The blocks x0 x1 x2 x3 in the order of the message, then what is left of it.
KR_CLMUL uint32_t finish(__m128i x0, __m128i x1, __m128i x2, __m128i x3, const uint8_t* data, size_t size) {
    const __m128i k = _mm_set_epi64x(kHigh128, kLow128);
    __m128i x = fold(fold(fold(x0, k, x1), k, x2), k, x3);
    for (; size >= 16; data += 16, size -= 16) x = fold(x, k, load16(data));
    alignas(16) uint8_t rest[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(rest), x);
    return by_tables(by_tables(0, rest, 16), data, size);
}

// size >= 64.
KR_CLMUL uint32_t by_clmul(uint32_t r, const uint8_t* data, size_t size) {
    const __m128i k = _mm_set_epi64x(kHigh512, kLow512);
    __m128i x0 = _mm_xor_si128(load16(data), _mm_cvtsi32_si128(static_cast<int>(r)));
    __m128i x1 = load16(data + 16), x2 = load16(data + 32), x3 = load16(data + 48);
    for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
        x0 = fold(x0, k, load16(data));
        x1 = fold(x1, k, load16(data + 16));
        x2 = fold(x2, k, load16(data + 32));
        x3 = fold(x3, k, load16(data + 48));
    }
    return finish(x0, x1, x2, x3, data, size);
}

KR_VCLMUL inline __m512i fold64(__m512i x, __m512i k, __m512i next) {
    __m512i low = _mm512_clmulepi64_epi128(x, k, 0x00), high = _mm512_clmulepi64_epi128(x, k, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96);  // the exclusive or of three
}

// size >= 256. Four registers of four blocks each, because a product takes several cycles.
KR_VCLMUL uint32_t by_vclmul(uint32_t r, const uint8_t* data, size_t size) {
    const __m512i far = _mm512_broadcast_i32x4(_mm_set_epi64x(kHigh2048, kLow2048));
    const __m512i near = _mm512_broadcast_i32x4(_mm_set_epi64x(kHigh512, kLow512));
    __m512i x0 =
        _mm512_xor_si512(_mm512_loadu_si512(data), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(r))));
    __m512i x1 = _mm512_loadu_si512(data + 64), x2 = _mm512_loadu_si512(data + 128);
    __m512i x3 = _mm512_loadu_si512(data + 192);
    for (data += 256, size -= 256; size >= 256; data += 256, size -= 256) {
        x0 = fold64(x0, far, _mm512_loadu_si512(data));
        x1 = fold64(x1, far, _mm512_loadu_si512(data + 64));
        x2 = fold64(x2, far, _mm512_loadu_si512(data + 128));
        x3 = fold64(x3, far, _mm512_loadu_si512(data + 192));
    }
    __m512i x = fold64(fold64(fold64(x0, near, x1), near, x2), near, x3);
    for (; size >= 64; data += 64, size -= 64) x = fold64(x, near, _mm512_loadu_si512(data));
    return finish(_mm512_extracti32x4_epi32(x, 0), _mm512_extracti32x4_epi32(x, 1), _mm512_extracti32x4_epi32(x, 2),
                  _mm512_extracti32x4_epi32(x, 3), data, size);
}

bool has_clmul() {
    static const bool found = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    return found;
}

bool has_vclmul() {
    static const bool found = __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f");
    return found;
}
#endif

uint32_t remainder(uint32_t r, const uint8_t* data, size_t size) {
#if KR_X86
    if (size >= 64 && isa() != Isa::scalar && has_clmul())
        return size >= 256 && isa() == Isa::avx512 && has_vclmul() ? by_vclmul(r, data, size) : by_clmul(r, data, size);
#endif
    return by_tables(r, data, size);
}

}  // namespace

uint32_t crc32(uint32_t crc, const uint8_t* data, size_t size) { return ~remainder(~crc, data, size); }

}  // namespace kr
