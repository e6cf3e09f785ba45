#include "cpu/sampling/encode_png.h"

#include "cpu/sampling/crc32.h"
#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/sampling/encode_png_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {
namespace {

constexpr int64_t kStored = 65535;         // bytes in one stored block: its length has 16 bits
constexpr int64_t kHead = 8 + 25 + 8 + 2;  // signature, IHDR chunk, length and type of IDAT, zlib header
constexpr int64_t kTail = 4 + 4 + 12;      // Adler-32, CRC of IDAT, IEND chunk

int64_t blocks_of(int64_t raw) { return (raw + kStored - 1) / kStored; }

uint8_t* put32(uint8_t* to, uint32_t value) {
    for (int shift = 24; shift >= 0; shift -= 8) *to++ = static_cast<uint8_t>(value >> shift);
    return to;
}

// Everything before the first stored block: the same for all images of a batch.
void write_head(int64_t height, int64_t width, int64_t channels, int64_t stream, uint8_t* out) {
    static const uint8_t colour_type[] = {0, 0, 4, 2, 6};  // grey, grey and alpha, RGB, RGB and alpha
    std::memcpy(out, "\x89PNG\r\n\x1a\n", 8);
    uint8_t* to = put32(out + 8, 13);
    std::memcpy(to, "IHDR", 4);
    to = put32(put32(to + 4, static_cast<uint32_t>(width)), static_cast<uint32_t>(height));
    *to++ = 8;  // bits a sample
    *to++ = colour_type[channels];
    std::memset(to, 0, 3);  // deflate, the only filter method, not interlaced
    to = put32(to + 3, crc32(0, out + 12, 17));
    to = put32(to, static_cast<uint32_t>(stream));
    std::memcpy(to, "IDAT\x78\x01", 6);
}

// The rows of one image as a stream of bytes, a 0 before each: take() hands out the next `size` of them.
struct Rows {
    const uint8_t* image;
    int64_t row;
    int64_t column = -1;  // -1: before the filter byte

    uint8_t* take(int64_t size, uint8_t* to) {
        while (size > 0) {
            if (column < 0) {
                *to++ = 0;
                --size;
                column = 0;
            }
            int64_t count = row - column < size ? row - column : size;
            std::memcpy(to, image, count);
            image += count;
            to += count;
            size -= count;
            column = column + count == row ? -1 : column + count;
        }
        return to;
    }
};

void encode_one(const uint8_t* image, int64_t height, int64_t row, const uint8_t* head, uint8_t* out) {
    const int64_t raw = height * (row + 1);
    std::memcpy(out, head, kHead);
    uint8_t* chunk = out + kHead - 6;  // the CRC covers the chunk from its type on
    uint8_t* to = out + kHead;
    Rows rows = {image, row};
    uint32_t adler = 1, crc = 0;
    for (int64_t done = 0; done < raw; done += kStored) {  // block by block: what was written is still in the cache
        const int64_t size = raw - done < kStored ? raw - done : kStored;
        *to++ = done + size == raw;  // the last block
        for (int64_t value : {size, ~size}) {
            *to++ = static_cast<uint8_t>(value);
            *to++ = static_cast<uint8_t>(value >> 8);
        }
        uint8_t* block = to;
        to = rows.take(size, to);
        adler = KR_DISPATCH(adler32, adler, block, size);
        crc = crc32(crc, chunk, to - chunk);
        chunk = to;
    }
    to = put32(to, adler);
    to = put32(to, crc32(crc, chunk, to - chunk));
    std::memcpy(to, "\0\0\0\0IEND\xae\x42\x60\x82", 12);
}

}  // namespace

void encode_png(const uint8_t* images, int64_t batch, int64_t height, int64_t width, int64_t channels, uint8_t* out,
                int threads) {
    const int64_t row = width * channels, raw = height * (row + 1);
    const int64_t size = kHead + raw + 5 * blocks_of(raw) + kTail;
    uint8_t head[kHead];
    write_head(height, width, channels, 2 + raw + 5 * blocks_of(raw) + 4, head);
    parallel_for(batch, (1 << 15) / size + 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) encode_one(images + i * height * row, height, row, head, out + i * size);
    });
}

}  // namespace kr
