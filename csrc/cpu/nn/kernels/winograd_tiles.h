// Included once per instruction set, by the kernels of winograd_conv2d and winograd_conv2d_grad_weight: the tiles of
// images, and the transform of their pixels.
//
// The points are 0, +-5/8, +-3/2 and infinity: with them the error is a third of that of the usual 0, +-1, +-2, and
// all constants of the transforms of pixels are exact.
// Transforms and products that share a function slow each other down by a tenth.
#define KR_APART __attribute__((noinline))

constexpr int kPlaces = 36;
constexpr int64_t kGroup = 16;  // channels side by side in V: the products then step by constants
constexpr int64_t kTiles = kWinogradTiles;
KR_FN int64_t round_up(int64_t channels) { return (channels + kGroup - 1) / kGroup * kGroup; }

constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

// One row of B^T d.
KR_FN void transform_in(const f32v* d, float* to, int64_t step) {
    const f32v even_a = fma(splat(-kB2), d[2], d[4]), odd_a = fma(splat(-kB2), d[1], d[3]);
    const f32v even_b = fma(splat(-kA2), d[2], d[4]), odd_b = fma(splat(-kA2), d[1], d[3]);
    store(to, fma(splat(kA2 * kB2), d[0], fma(splat(-kA2 - kB2), d[2], d[4])));
    store(to + step, fma(splat(kA), odd_a, even_a));
    store(to + 2 * step, fma(splat(-kA), odd_a, even_a));
    store(to + 3 * step, fma(splat(kB), odd_b, even_b));
    store(to + 4 * step, fma(splat(-kB), odd_b, even_b));
    store(to + 5 * step, fma(splat(kA2 * kB2), d[1], fma(splat(-kA2 - kB2), d[3], d[5])));
}

// One vector of channels of 6x6 pixels.
struct Pixels {
    const float* from;
    int64_t down, across;  // from one pixel to the next
    __attribute__((always_inline)) f32v at(int i, int j) const { return load(from + i * down + j * across); }
};

// One vector of channels of a tile, from 36 pixels to 36 places `step` apart. Rows of B^T d that share terms are made
// together and pixels are read again for the next ones: everything then stays in registers.
template <class Source>
KR_FN void tile_in(const Source& d, float* to, int64_t step) {
    f32v first[6], second[6];
    KR_UNROLL for (int j = 0; j < 6; ++j) first[j] =
        fma(splat(kA2 * kB2), d.at(0, j), fma(splat(-kA2 - kB2), d.at(2, j), d.at(4, j)));
    transform_in(first, to, step);
    KR_UNROLL for (int pair = 0; pair < 2; ++pair) {
        const f32v point = splat(pair ? kB : kA), other = splat(pair ? -kA2 : -kB2);
        KR_UNROLL for (int j = 0; j < 6; ++j) {
            const f32v even = fma(other, d.at(2, j), d.at(4, j)), odd = fma(other, d.at(1, j), d.at(3, j));
            first[j] = fma(point, odd, even);
            second[j] = fma(splat(0.0f) - point, odd, even);
        }
        transform_in(first, to + (6 + 12 * pair) * step, step);
        transform_in(second, to + (12 + 12 * pair) * step, step);
    }
    KR_UNROLL for (int j = 0; j < 6; ++j) first[j] =
        fma(splat(kA2 * kB2), d.at(1, j), fma(splat(-kA2 - kB2), d.at(3, j), d.at(5, j)));
    transform_in(first, to + 30 * step, step);
}

struct Tiles {
    int64_t down, across;  // of an image
};
struct Tile {
    int64_t image, row, column;  // of its first pixel
};

KR_FN Tile tile_at(const Tiles& tiles, int64_t number) {
    const int64_t each = tiles.down * tiles.across, place = number % each;
    return {number / each, 4 * (place / tiles.across), 4 * (place % tiles.across)};
}

// Channels of an NHWC array, from the first pixel of its first image on.
struct Channels {
    const float* from;
    int64_t height, width, step;  // step: from one pixel to the next
};

// The tile behind this one.
KR_FN Tile next_tile(const Tiles& tiles, Tile tile) {
    tile.column += 4;
    if (tile.column < 4 * tiles.across) return tile;
    tile.column = 0, tile.row += 4;
    if (tile.row >= 4 * tiles.down) tile.row = 0, ++tile.image;
    return tile;
}

// One vector of channels of kSide x kSide pixels of which some lie outside the image, or of the last channels.
template <int kSide>
struct EdgePixels {
    const float* rows[kSide];
    int64_t across;
    int live[kSide];  // lanes to read of a column
    __attribute__((always_inline)) f32v at(int i, int j) const {
        return load_part(rows[i] + j * across, live[j], 0.0f);
    }
};

// The first channels of the pixels from (top, left) on; `zeros` holds kSide pixels.
template <int kSide>
KR_FN EdgePixels<kSide> edge_pixels(const Channels& x, int64_t image, int64_t top, int64_t left, const float* zeros) {
    EdgePixels<kSide> found;
    found.across = x.step;
    for (int i = 0; i < kSide; ++i) {
        const int64_t row = top + i;
        const float* first = x.from + ((image * x.height + row) * x.width + left) * x.step;
        found.rows[i] = row >= 0 && row < x.height ? first : zeros;
    }
    return found;
}

// Reads from `channel` on, of which `left` remain; the first call has channel 0.
template <int kSide>
KR_FN void move_to(EdgePixels<kSide>& pixels, const Channels& x, int64_t column, int64_t channel, int64_t left) {
    const int lanes = left < kLanes ? left > 0 ? (int)left : 0 : kLanes;
    for (int j = 0; j < kSide; ++j) pixels.live[j] = column + j >= 0 && column + j < x.width ? lanes : 0;
    if (channel)
        for (int i = 0; i < kSide; ++i) pixels.rows[i] += kLanes;
}

#if KR_LANES == 8
// A masked load costs as much as a few others: each is done once.
template <int kSide>
struct Copy {
    alignas(64) float memory[kSide * kSide * kLanes];
    __attribute__((always_inline)) explicit Copy(const EdgePixels<kSide>& from) {
        for (int i = 0; i < kSide; ++i)
            KR_UNROLL for (int j = 0; j < kSide; ++j) store(memory + (i * kSide + j) * kLanes, from.at(i, j));
    }
    __attribute__((always_inline)) f32v at(int i, int j) const { return load(memory + (i * kSide + j) * kLanes); }
};
#else
template <int kSide>
using Copy = const EdgePixels<kSide>&;
#endif

// Tiles between one that is asked for and the one that is transformed. Where activations come from memory and not from
// the cache, as in training, this halves the time of 16 channels.
constexpr int64_t kReadAhead = 16, kWriteAhead = 8;

// Asks for the 4x4 pixels of a tile, of `count` channels. A prefetch may name what is outside the image, or the array.
KR_FN void prefetch_tile(const Channels& x, const Tile& tile, int64_t count) {
    const float* first = x.from + ((tile.image * x.height + tile.row) * x.width + tile.column) * x.step;
    for (int i = 0; i < 4; ++i, first += x.width * x.step)
        for (int64_t channel = 0; channel < count; channel += 16)
            KR_UNROLL for (int j = 0; j < 4; ++j) __builtin_prefetch(first + j * x.step + channel);
}

KR_FN int64_t place_of(int64_t channel) { return channel / kGroup * kTiles * kGroup + channel % kGroup; }

// V of `count` channels of one tile, [36][groups][kTiles][16] with `step` floats between places.
static KR_APART void transform_tile(const Channels& x, int64_t count, const Tile& tile, const float* zeros, float* to,
                                    int64_t step) {
    const int64_t top = tile.row - 1, left = tile.column - 1, padded = round_up(count);
    int64_t channel = 0;
    if (top >= 0 && left >= 0 && top + 6 <= x.height && left + 6 <= x.width) {
        const float* from = x.from + ((tile.image * x.height + top) * x.width + left) * x.step;
        for (; channel + kLanes <= count; channel += kLanes)
            tile_in(Pixels{from + channel, x.width * x.step, x.step}, to + place_of(channel), step);
    }
    if (channel == padded) return;
    Channels rest = x;
    rest.from += channel;
    EdgePixels<6> pixels = edge_pixels<6>(rest, tile.image, top, left, zeros);
    for (const int64_t first = channel; channel < padded; channel += kLanes) {
        move_to(pixels, x, left, channel - first, count - channel);
        tile_in(Copy<6>(pixels), to + place_of(channel), step);
    }
}
