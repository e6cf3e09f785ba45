// Elements of tensors on the device: float32, bfloat16 and float16 to float and back, one or several, and image bytes.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cuda/device/lane.h"

namespace kr {
namespace cuda {

// 16-bit elements travel two in a word, the first one in the low half.
#ifdef __CUDACC__
KR_FN float half_bits_to_float(uint32_t low) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"((unsigned short)low));
    return out;
}
KR_FN uint32_t float_to_half_bits(float a) {
    unsigned short out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(a));
    return out;
}
#else
KR_FN float half_bits_to_float(uint32_t low) { return half_to_float((uint16_t)low); }
KR_FN uint32_t float_to_half_bits(float a) { return float_to_half(a); }
#endif
KR_FN uint32_t float_to_bf16_bits(float a) {
    const uint32_t bits = __float_as_uint(a);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return a == a ? rounded : 0x7FC0u;
}

// Two elements in a word, rounded to nearest even.
KR_FN uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
#else
    return float_to_bf16_bits(low) | float_to_bf16_bits(high) << 16;
#endif
}
KR_FN uint32_t pack_half(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
#else
    return float_to_half_bits(low) | float_to_half_bits(high) << 16;
#endif
}

struct F32 {
    static constexpr int size = 4;
    static constexpr uint32_t minus_inf = 0xFF800000u;
    static KR_INLINE float one(const void* base, int64_t at) { return static_cast<const float*>(base)[at]; }
    static KR_INLINE void set_one(void* base, int64_t at, float value) { static_cast<float*>(base)[at] = value; }
    template <int V>
    static KR_INLINE void expand(const uint32_t (&words)[V], float* to) {
#pragma unroll
        for (int k = 0; k < V; ++k) to[k] = __uint_as_float(words[k]);
    }
    template <int V>
    static KR_INLINE void pack(const float* from, uint32_t (&words)[V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) words[k] = __float_as_uint(from[k]);
    }
};

struct BF16 {
    static constexpr int size = 2;
    static constexpr uint32_t minus_inf = 0xFF80FF80u;
    static KR_INLINE float one(const void* base, int64_t at) {
        return __uint_as_float((uint32_t)static_cast<const uint16_t*>(base)[at] << 16);
    }
    static KR_INLINE void set_one(void* base, int64_t at, float value) {
        static_cast<uint16_t*>(base)[at] = (uint16_t)float_to_bf16_bits(value);
    }
    template <int W>
    static KR_INLINE void expand(const uint32_t (&words)[W], float* to) {
#pragma unroll
        for (int k = 0; k < W; ++k) {
            to[2 * k] = __uint_as_float(words[k] << 16);
            to[2 * k + 1] = __uint_as_float(words[k] & 0xFFFF0000u);
        }
    }
    template <int W>
    static KR_INLINE void pack(const float* from, uint32_t (&words)[W]) {
#pragma unroll
        for (int k = 0; k < W; ++k) words[k] = pack_bf16(from[2 * k], from[2 * k + 1]);
    }
};

struct F16 {
    static constexpr int size = 2;
    static constexpr uint32_t minus_inf = 0xFC00FC00u;
    static KR_INLINE float one(const void* base, int64_t at) {
        return half_bits_to_float(static_cast<const uint16_t*>(base)[at]);
    }
    static KR_INLINE void set_one(void* base, int64_t at, float value) {
        static_cast<uint16_t*>(base)[at] = (uint16_t)float_to_half_bits(value);
    }
    template <int W>
    static KR_INLINE void expand(const uint32_t (&words)[W], float* to) {
#pragma unroll
        for (int k = 0; k < W; ++k) {
            to[2 * k] = half_bits_to_float(words[k] & 0xFFFFu);
            to[2 * k + 1] = half_bits_to_float(words[k] >> 16);
        }
    }
    template <int W>
    static KR_INLINE void pack(const float* from, uint32_t (&words)[W]) {
#pragma unroll
        for (int k = 0; k < W; ++k) words[k] = pack_half(from[2 * k], from[2 * k + 1]);
    }
};

// Calls what(F32()), what(BF16()) or what(F16()). The dtype is the same for all threads, so the branch costs nothing,
// and one kernel serves all pairs of dtypes.
template <class What>
KR_FN void with_dtype(Dtype dtype, What what) {
    if (dtype == Dtype::f32)
        what(F32());
    else if (dtype == Dtype::bf16)
        what(BF16());
    else
        what(F16());
}

KR_FN float read_element(const void* base, Dtype dtype, int64_t at) {
    return dtype == Dtype::f32 ? F32::one(base, at) : dtype == Dtype::bf16 ? BF16::one(base, at) : F16::one(base, at);
}

KR_FN void write_element(void* base, Dtype dtype, int64_t at, float value) {
    if (dtype == Dtype::f32)
        F32::set_one(base, at, value);
    else if (dtype == Dtype::bf16)
        BF16::set_one(base, at, value);
    else
        F16::set_one(base, at, value);
}

// 127.5 clamp(a) + 127.5 to even, NaN to 0: adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
KR_FN uint8_t to_byte(float a) {
    const float clamped = a > -1.0f ? (a < 1.0f ? a : 1.0f) : -1.0f;
    return (uint8_t)(__float_as_int(__fadd_rn(__fmaf_rn(clamped, 127.5f, 127.5f), 12582912.0f)) & 0xFF);
}

}  // namespace cuda
}  // namespace kr
