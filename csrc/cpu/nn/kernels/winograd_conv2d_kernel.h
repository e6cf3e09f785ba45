// Included once per instruction set by winograd_conv2d.cpp.
//
// Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016):
// 36 products for 16 pixels where the definition has 144. A block of tiles goes through three steps, and what lies
// between them stays in the cache: 6x6 pixels of a tile are transformed (V), each of the 36 places is a matrix product
// of tiles by inputs with inputs by outputs (M), and M is transformed back, with all that follows the convolution.
#include "cpu/simd/vec_math.h"

#include "cpu/nn/kernels/activations.h"
#include "cpu/nn/kernels/positive_bits.h"
#include "cpu/nn/kernels/winograd_tiles.h"

#define KR_UNROLL_ROWS _Pragma("GCC unroll 32")

// Rows and vectors of a product that the registers hold.
#if KR_LANES == 16
constexpr int kRows16 = 21, kRows32 = 14;
#elif KR_LANES == 8
constexpr int kRows16 = 6, kRows32 = 3;
#else
constexpr int kRows16 = 1, kRows32 = 1;
#endif
static_assert(kWinogradTiles % kRows16 == 0 && kWinogradTiles % kRows32 == 0, "products are whole");
constexpr int64_t kPart = KR_LANES == 16 ? kWinogradPart : 1;

// A^T m
KR_FN void transform_out(const f32v* m, f32v* out) {
    const f32v sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    out[0] = m[0] + sum_a + sum_b;
    out[1] = fma(splat(kB), difference_b, splat(kA) * difference_a);
    out[2] = fma(splat(kB2), sum_b, splat(kA2) * sum_a);
    out[3] = fma(splat(kB2 * kB), difference_b, fma(splat(kA2 * kA), difference_a, m[5]));
}

// `kRows` tiles by one block of outputs: a is [groups][kTiles][16], b [inputs][block], rows of c `c_step` apart.
template <int kRows, int kVectors>
KR_FN void multiply(const float* a, int64_t inputs, const float* b, float* c, int64_t c_step) {
    f32v sum[kRows][kVectors] = {};
    for (int64_t left = inputs; left > 0; left -= kGroup, a += kTiles * kGroup)
        for (int k = 0; k < kGroup && k < left; ++k, b += kVectors * kLanes) {
            f32v w[kVectors];
            KR_UNROLL for (int v = 0; v < kVectors; ++v) w[v] = load(b + v * kLanes);
            KR_UNROLL_ROWS for (int r = 0; r < kRows; ++r) {
                const f32v value = splat(a[r * kGroup + k]);
                KR_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(value, w[v], sum[r][v]);
            }
        }
    KR_UNROLL_ROWS for (int r = 0; r < kRows; ++r) KR_UNROLL for (int v = 0; v < kVectors; ++v)
        store(c + r * c_step + v * kLanes, sum[r][v]);
}

template <int kRows, int kBlock>
static void multiply_places(const float* v, int64_t step, const float* weight, int64_t blocks, int64_t part,
                            int64_t inputs, int64_t tiles, float* m) {
    const int64_t padded = (inputs + kGroup - 1) / kGroup * kGroup;
    for (int place = 0; place < kPlaces; ++place)
        for (int64_t block = 0; block < part; ++block) {
            const float* b = weight + (place * blocks + block) * padded * kBlock;
            for (int64_t t = 0; t < tiles; t += kRows)
                multiply<kRows, kBlock / kLanes>(v + place * step + t * kGroup, inputs, b,
                                                 m + ((block * kTiles + t) * kPlaces + place) * kBlock,
                                                 kPlaces * kBlock);
        }
}

// NaN where either is.
KR_FN f32v larger(f32v a, f32v b) { return a > b ? a : b != b ? b : a != a ? a : b; }

template <Activation kind>
KR_FN f32v activate(f32v a) {
    if (kind == Activation::relu) return max(splat(0.0f), a);  // a where it is NaN
    if (kind == Activation::gelu) return gelu(a);
    if (kind == Activation::silu) return silu(a);
    return a;
}

// One tile's M, [36][block], back to pixels. Even rows of A^T m are made of sums and odd ones of differences: two at a
// time everything stays in registers.
template <bool odd>
KR_FN void two_rows(const float* m, int64_t block, f32v* pixels, f32v* pixels_below) {
    f32v first[6], second[6];
    KR_UNROLL for (int j = 0; j < 6; ++j) {
        const float* at = m + j * block;
        const int64_t step = 6 * block;
        const f32v a = load(at + step), minus_a = load(at + 2 * step);
        const f32v b = load(at + 3 * step), minus_b = load(at + 4 * step);
        if (odd) {
            const f32v d = a - minus_a, e = b - minus_b;
            first[j] = fma(splat(kB), e, splat(kA) * d);
            second[j] = fma(splat(kB2 * kB), e, fma(splat(kA2 * kA), d, load(at + 5 * step)));
        } else {
            const f32v d = a + minus_a, e = b + minus_b;
            first[j] = load(at) + d + e;
            second[j] = fma(splat(kB2), e, splat(kA2) * d);
        }
    }
    transform_out(first, pixels);
    transform_out(second, pixels_below);
}

// Where a tile's pixels go: one vector of channels of them.
struct Place {
    int64_t first, down, across;  // in y, from one pixel to the next
    int rows, columns, live;      // of y in this tile; lanes
    f32v scale, bias;
};

// What follows the convolution, for `columns` pixels of a row of y.
template <Activation kind, bool full>
KR_FN void finish(const WinogradConv& call, const Place& place, int row, int most, const f32v* pixels) {
    KR_UNROLL for (int j = 0; j < most; ++j) {
        if (!full && j >= place.columns) return;
        const int64_t at = place.first + row * place.down + j * place.across;
        f32v a = fma(pixels[j], place.scale, place.bias);
        if (call.residual) {
            const float* other = call.residual + at;
            f32v more = full ? load(other) : load_part(other, place.live, 0.0f);
            if (call.residual_bits) more = where_bits(call.residual_bits, at, more);
            a = a + more;
        }
        a = activate<kind>(a);
        if (full)
            store(call.y + at, a);
        else
            store_part(call.y + at, a, place.live);
    }
}

template <Activation kind, bool pool, bool full>
KR_FN void tile_out(const WinogradConv& call, const Place& place, const float* m, int64_t block) {
    f32v top[8], below[8];  // rows 0 and 2, rows 1 and 3
    two_rows<false>(m, block, top, top + 4);
    if (pool) {
        f32v found[2];
        two_rows<true>(m, block, below, below + 4);
        KR_UNROLL for (int i = 0; i < 2; ++i) {
            KR_UNROLL for (int j = 0; j < 2; ++j) {
                const int k = 4 * i + 2 * j;
                found[j] = larger(larger(top[k], top[k + 1]), larger(below[k], below[k + 1]));
            }
            if (full || i < place.rows) finish<kind, full>(call, place, i, 2, found);
        }
        return;
    }
    finish<kind, full>(call, place, 0, 4, top);
    if (full || place.rows > 2) finish<kind, full>(call, place, 2, 4, top + 4);
    two_rows<true>(m, block, below, below + 4);
    if (full || place.rows > 1) finish<kind, full>(call, place, 1, 4, below);
    if (full || place.rows > 3) finish<kind, full>(call, place, 3, 4, below + 4);
}

template <Activation kind, bool pool>
static void transform_back(const WinogradConv& call, const Tiles& tiles, int64_t begin, int64_t end, const float* m,
                           int64_t first, int64_t last) {
    const int64_t block = winograd_block(call.outputs), shrink = pool ? 2 : 1, side = 4 / shrink;
    const int64_t height = call.height / shrink, width = call.width / shrink;
    const Channels y = {call.y + first, height, width, call.outputs};
    const Channels residual = {call.residual ? call.residual + first : nullptr, height, width, call.outputs};
    Tile tile = tile_at(tiles, begin), ahead = tile_at(tiles, begin + kWriteAhead);
    for (int64_t number = begin; number < end; ++number) {
        if (!pool) prefetch_tile(y, ahead, last - first);
        if (!pool && call.residual) prefetch_tile(residual, ahead, last - first);
        const int64_t top = tile.row / shrink, left = tile.column / shrink;
        Place place;
        place.down = width * call.outputs, place.across = call.outputs;
        place.rows = (int)(height - top < side ? height - top : side);
        place.columns = (int)(width - left < side ? width - left : side);
        const bool whole = place.rows == side && place.columns == side;
        for (int64_t channel = first; channel < last; channel += kLanes) {
            const int live = last - channel < kLanes ? (int)(last - channel) : kLanes;
            const float* from =
                m + ((channel - first) / block * kTiles + number - begin) * kPlaces * block + channel % block;
            place.first = ((tile.image * height + top) * width + left) * call.outputs + channel;
            place.live = live;
            place.scale = call.scale ? load_part(call.scale + channel, live, 0.0f) : splat(1.0f);
            place.bias = call.bias ? load_part(call.bias + channel, live, 0.0f) : splat(0.0f);
            if (whole && live == kLanes)
                tile_out<kind, pool, true>(call, place, from, block);
            else
                tile_out<kind, pool, false>(call, place, from, block);
        }
        tile = next_tile(tiles, tile), ahead = next_tile(tiles, ahead);
    }
}

template <Activation kind>
static void transform_back(const WinogradConv& call, const Tiles& tiles, int64_t begin, int64_t end, const float* m,
                           int64_t first, int64_t last) {
    if (call.pool)
        transform_back<kind, true>(call, tiles, begin, end, m, first, last);
    else
        transform_back<kind, false>(call, tiles, begin, end, m, first, last);
}

// Tiles [begin, end), at most kTiles of them. v holds 36 winograd_step(inputs) floats, m 36 kTiles by kPart blocks,
// zeros 6 pixels and 16 floats.
static void winograd_block_of_tiles(const WinogradConv& call, const Tiles& tiles, int64_t begin, int64_t end, float* v,
                                    float* m, const float* zeros) {
    const int64_t groups = (call.inputs + kGroup - 1) / kGroup, step = winograd_step(call.inputs);
    const int64_t block = winograd_block(call.outputs), blocks = (call.outputs + block - 1) / block;
    const Channels x = {call.x, call.height, call.width, call.inputs};
    Tile tile = tile_at(tiles, begin), ahead = tile_at(tiles, begin + kReadAhead);
    for (int64_t t = 0; t < end - begin; ++t) {
        prefetch_tile(x, ahead, call.inputs);
        transform_tile(x, call.inputs, tile, zeros, v + t * kGroup, step);
        tile = next_tile(tiles, tile), ahead = next_tile(tiles, ahead);
    }
    const int64_t rows = block == 16 ? kRows16 : kRows32, count = (end - begin + rows - 1) / rows * rows;
    for (int64_t t = end - begin; t < count; ++t)  // rows of a last product that no tile fills
        for (int64_t p = 0; p < kPlaces * groups; ++p)
            for (int64_t k = 0; k < kGroup; ++k) v[p / groups * step + (p % groups * kTiles + t) * kGroup + k] = 0.0f;
    for (int64_t first = 0; first < blocks; first += kPart) {
        const int64_t part = blocks - first < kPart ? blocks - first : kPart, from = first * block;
        const int64_t to = from + part * block < call.outputs ? from + part * block : call.outputs;
        const float* weight = call.weight + from * groups * kGroup;
        if (block == 16)
            multiply_places<kRows16, 16>(v, step, weight, blocks, part, call.inputs, count, m);
        else
            multiply_places<kRows32, 32>(v, step, weight, blocks, part, call.inputs, count, m);
        if (call.activation == Activation::relu) transform_back<Activation::relu>(call, tiles, begin, end, m, from, to);
        if (call.activation == Activation::gelu) transform_back<Activation::gelu>(call, tiles, begin, end, m, from, to);
        if (call.activation == Activation::silu) transform_back<Activation::silu>(call, tiles, begin, end, m, from, to);
        if (call.activation == Activation::none) transform_back<Activation::none>(call, tiles, begin, end, m, from, to);
    }
}
#undef KR_UNROLL_ROWS
#undef KR_APART
