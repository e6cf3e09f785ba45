// Elements of tensors on the device: loads and stores in their dtype, and image bytes.
#pragma once
#include "common/dtype.h"
#include "cuda/device/lane.h"

namespace kr {
namespace cuda {

KR_FN float read_element(const void* from, Dtype dtype, int64_t at) {
    if (dtype == Dtype::f32) return static_cast<const float*>(from)[at];
    const uint16_t bits = static_cast<const uint16_t*>(from)[at];
    return dtype == Dtype::bf16 ? bf16_to_float(bits) : half_to_float(bits);
}

KR_FN void write_element(void* to, Dtype dtype, int64_t at, float value) {
    if (dtype == Dtype::f32)
        static_cast<float*>(to)[at] = value;
    else
        static_cast<uint16_t*>(to)[at] = dtype == Dtype::bf16 ? float_to_bf16(value) : float_to_half(value);
}

// 127.5 clamp(a) + 127.5 to even, NaN to 0: adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
KR_FN uint8_t to_byte(float a) {
    const float clamped = a > -1.0f ? (a < 1.0f ? a : 1.0f) : -1.0f;
    return (uint8_t)(__float_as_int(__fadd_rn(__fmaf_rn(clamped, 127.5f, 127.5f), 12582912.0f)) & 0xFF);
}

}  // namespace cuda
}  // namespace kr
