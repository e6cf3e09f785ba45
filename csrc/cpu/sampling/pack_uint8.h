#pragma once
#include <cstdint>

namespace kr {

// out[n, h, w, c] = round(127.5 clamp(x[n, c, h, w], -1, 1) + 127.5), halves to even, NaN to 0. out is contiguous;
// x has the strides of a contiguous (channels_last = false) or channels_last tensor.
void pack_uint8(const float* x, int64_t batch, int64_t channels, int64_t pixels, bool channels_last, uint8_t* out,
                int threads);

}  // namespace kr
