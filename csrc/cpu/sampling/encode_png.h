#pragma once
#include <cstdint>

namespace kr {

// images: [batch, height, width, channels] bytes, channels 1 to 4 -> out: one PNG after the other, each of
// 63 + n + 5 ceil(n / 65535) bytes, n = height (1 + width channels): one IDAT chunk, a zlib stream of stored blocks
// (RFC 1951, 3.2.4), filter 0 in each row.
void encode_png(const uint8_t* images, int64_t batch, int64_t height, int64_t width, int64_t channels, uint8_t* out,
                int threads);

}  // namespace kr
