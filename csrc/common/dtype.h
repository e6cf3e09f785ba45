// Element types of tensors that C++ is handed, and conversions that round to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KR_HOST_DEVICE __host__ __device__ inline
#else
#define KR_HOST_DEVICE inline
#endif

namespace kr {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };  // the numbers that Python passes

KR_HOST_DEVICE float bf16_to_float(uint16_t a) {
    const uint32_t bits = (uint32_t)a << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

KR_HOST_DEVICE uint16_t float_to_bf16(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(a == a ? rounded : 0x7FC0u);
}

KR_HOST_DEVICE float half_to_float(uint16_t a) {
    // The exponent is moved by a multiplication, which also makes subnormals right; infinities and NaN by hand.
    uint32_t bits = (uint32_t)(a & 0x7FFFu) << 13;
    float out;
    std::memcpy(&out, &bits, 4);
    out *= 0x1p112f;
    std::memcpy(&bits, &out, 4);
    if ((a & 0x7C00u) == 0x7C00u) bits = 0x7F800000u | ((uint32_t)(a & 0x3FFu) << 13);
    bits |= (uint32_t)(a & 0x8000u) << 16;
    std::memcpy(&out, &bits, 4);
    return out;
}

KR_HOST_DEVICE uint16_t float_to_half(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    bits &= 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return sign | 0x7E00u;   // NaN
    if (bits >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and above round to infinity
    if (bits < 0x38800000u) {                        // subnormal: let an addition do the rounding
        float tiny;
        std::memcpy(&tiny, &bits, 4);
        tiny += 0.5f;
        std::memcpy(&bits, &tiny, 4);
        return sign | (uint16_t)(bits - 0x3F000000u);
    }
    bits += 0xC8000FFFu + ((bits >> 13) & 1u);  // rebias the exponent and round
    return sign | (uint16_t)(bits >> 13);
}

}  // namespace kr
