#pragma once
#include <cstdint>

namespace kr {

// Output i of an axis is the sum over k of weights[i, k] / 2^14 times input first[i] + k. Each row of weights is not
// negative and sums to 2^14, so that a constant stays what it is.
struct ResizeAxis {
    int64_t from, to, taps;  // first[i] + taps <= from
    const int64_t* first;    // [to]
    const int16_t* weights;  // [to, taps]
};

// pixels: bytes [rows.from, columns.from, channels], stride between rows -> the first out_channels of each pixel at
// out: bytes [rows.to, columns.to, out_channels], out_stride between rows.
struct ResizeImage {
    const uint8_t* pixels;
    int64_t stride, channels;
    uint8_t* out;
    int64_t out_stride, out_channels;
    ResizeAxis rows, columns;
};

void resize_image(const ResizeImage& call);

}  // namespace kr
