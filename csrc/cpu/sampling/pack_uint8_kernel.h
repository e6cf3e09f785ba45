// Included once per instruction set by pack_uint8.cpp.

// 127.5 clamp(a) + 127.5 rounded to even, in [0, 255]: adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
KR_FN i32v to_byte(f32v a) {
    f32v low = a > splat(-1.0f) ? a : splat(-1.0f);  // NaN goes to -1, which is byte 0
    f32v clamped = low < splat(1.0f) ? low : splat(1.0f);
    return as_i(fma(clamped, splat(127.5f), splat(127.5f)) + splat(12582912.0f)) & 0xFF;
}

// One image of `channels` planes, `step` floats apart, to interleaved bytes; a channels_last image is one plane.
static void pack_image(const float* x, int64_t channels, int64_t pixels, uint8_t* out) {
    for (int64_t c = 0; c < channels; ++c) {
        const float* plane = x + c * pixels;
        for (int64_t i = 0; i < pixels; i += kLanes) {
            const int n = (int)(pixels - i < kLanes ? pixels - i : kLanes);
            i32v value = to_byte(n == kLanes ? load(plane + i) : load_part(plane + i, n, 0.0f));
            int32_t lanes[kLanes];
            std::memcpy(lanes, &value, sizeof lanes);
            for (int k = 0; k < n; ++k) out[(i + k) * channels + c] = (uint8_t)lanes[k];
        }
    }
}
