// Included once per instruction set by winograd_conv2d_grad_weight.cpp.
//
// The gradient of the filters is itself a minimal filtering, F(3x3, 4x4): of Y = A^T [(G g G^T) . (B^T d B)] A the
// derivative by g is
//
//   dg = G^T [sum over tiles (A dY A^T) . (B^T d B)] G
//
// with 4x4 pixels dY of the gradient of a tile and the 6x6 pixels d that it read: 36 products where the definition has
// 144. A block of tiles is transformed (V of the inputs, W of the gradient), each of the 36 places is a product of
// inputs by tiles with tiles by outputs that is added to its sum, and the sums are transformed once, at the end.
#include "cpu/nn/kernels/winograd_tiles.h"
#include "cpu/simd/doubles.h"
#include "cpu/simd/transpose.h"

// Inputs and vectors of outputs of a product that the registers hold: at least 8 sums at work at a time, and 12 where
// they fit, for each waits four cycles for the one before. The last product of a group of 16 inputs has what is left.
#if KR_LANES == 16
constexpr int kRows = 8, kRowsNarrow = 16;
#elif KR_LANES == 8
constexpr int kRows = 6, kRowsNarrow = 8;
#else
constexpr int kRows = 4, kRowsNarrow = 8;
#endif
constexpr int kLastRows = kGroup % kRows ? kGroup % kRows : kRows;

// Floats from a place's sums to the next one's. A line more than they are: at a distance of 4 KB all 36 would share a
// set of the first cache.
KR_FN int64_t sums_step(const WinogradGradPart& part) {
    return round_up(part.inputs) * round_up(part.outputs) + kGroup;
}

// One row of A y.
KR_FN void transform_grad_row(const f32v* y, float* to, int64_t step) {
    const f32v even_a = fma(splat(kA2), y[2], y[0]), odd_a = fma(splat(kA2), y[3], y[1]);
    const f32v even_b = fma(splat(kB2), y[2], y[0]), odd_b = fma(splat(kB2), y[3], y[1]);
    store(to, y[0]);
    store(to + step, fma(splat(kA), odd_a, even_a));
    store(to + 2 * step, fma(splat(-kA), odd_a, even_a));
    store(to + 3 * step, fma(splat(kB), odd_b, even_b));
    store(to + 4 * step, fma(splat(-kB), odd_b, even_b));
    store(to + 5 * step, y[3]);
}

// A y A^T of one vector of channels, to 36 places `step` apart. Returns the sum of the pixels.
template <class Source>
KR_FN f32v tile_grad(const Source& y, float* to, int64_t step) {
    f32v first[4], second[4], sum = {};
    KR_UNROLL for (int j = 0; j < 4; ++j) {
        first[j] = y.at(0, j);
        second[j] = y.at(3, j);
        sum = sum + (first[j] + y.at(1, j)) + (y.at(2, j) + second[j]);
    }
    transform_grad_row(first, to, step);
    transform_grad_row(second, to + 30 * step, step);
    KR_UNROLL for (int pair = 0; pair < 2; ++pair) {
        const f32v point = splat(pair ? kB : kA), square = splat(pair ? kB2 : kA2);
        KR_UNROLL for (int j = 0; j < 4; ++j) {
            const f32v even = fma(square, y.at(2, j), y.at(0, j)), odd = fma(square, y.at(3, j), y.at(1, j));
            first[j] = fma(point, odd, even);
            second[j] = fma(splat(0.0f) - point, odd, even);
        }
        transform_grad_row(first, to + (6 + 12 * pair) * step, step);
        transform_grad_row(second, to + (12 + 12 * pair) * step, step);
    }
    return sum;
}

// W of `count` channels of one tile, as transform_tile writes V. The pixels are added to `bias`.
static KR_APART void transform_grad(const Channels& y, int64_t count, const Tile& tile, const float* zeros, float* to,
                                    int64_t step, float* bias) {
    const int64_t padded = round_up(count);
    int64_t channel = 0;
    if (tile.row + 4 <= y.height && tile.column + 4 <= y.width) {
        const float* from = y.from + ((tile.image * y.height + tile.row) * y.width + tile.column) * y.step;
        for (; channel + kLanes <= count; channel += kLanes) {
            const f32v sum = tile_grad(Pixels{from + channel, y.width * y.step, y.step}, to + place_of(channel), step);
            store(bias + channel, load(bias + channel) + sum);
        }
    }
    if (channel == padded) return;
    Channels rest = y;
    rest.from += channel;
    EdgePixels<4> pixels = edge_pixels<4>(rest, tile.image, tile.row, tile.column, zeros);
    for (const int64_t start = channel; channel < padded; channel += kLanes) {
        move_to(pixels, y, tile.column, channel - start, count - channel);
        const f32v sum = tile_grad(Copy<4>(pixels), to + place_of(channel), step);
        store(bias + channel, load(bias + channel) + sum);
    }
}

// sums[input][output] += sum over tiles v[tile][input] w[tile][output], or = where `add` is false. The sum of a block
// is made by itself: that halves the error of a chunk's.
template <int kInputs, int kVectors>
KR_FN void multiply_tiles(const float* v, const float* w, int64_t tiles, float* sums, int64_t step, bool add) {
    f32v sum[kInputs][kVectors] = {};
    const float* second = w + place_of(kLanes);
    for (int64_t t = 0; t < tiles; ++t, v += kGroup, w += kGroup, second += kGroup) {
        f32v value[kVectors];
        KR_UNROLL for (int n = 0; n < kVectors; ++n) value[n] = load(n ? second : w);
        KR_UNROLL for (int r = 0; r < kInputs; ++r) {
            const f32v factor = splat(v[r]);
            KR_UNROLL for (int n = 0; n < kVectors; ++n) sum[r][n] = fma(factor, value[n], sum[r][n]);
        }
    }
    KR_UNROLL for (int r = 0; r < kInputs; ++r) KR_UNROLL for (int n = 0; n < kVectors; ++n) {
        float* to = sums + r * step + n * kLanes;
        store(to, add ? load(to) + sum[r][n] : sum[r][n]);
    }
}

// sums [36][inputs][outputs], sums_step apart, of what a block of tiles was transformed to.
static KR_APART void multiply_places(const WinogradGradPart& part, int64_t tiles, const float* v, const float* w,
                                     float* sums, bool add) {
    const int64_t wide = round_up(part.outputs), step = sums_step(part);
    const int64_t v_step = winograd_step(part.inputs), w_step = winograd_step(part.outputs);
    for (int place = 0; place < kPlaces; ++place, v += v_step, w += w_step, sums += step) {
        int64_t o = 0;
        for (; o + 2 * kLanes <= wide; o += 2 * kLanes)
            for (int64_t i = 0; i < part.inputs;) {
                const float *high = v + place_of(i), *across = w + place_of(o);
                if (i % kGroup + kRows <= kGroup) {
                    multiply_tiles<kRows, 2>(high, across, tiles, sums + i * wide + o, wide, add);
                    i += kRows;
                } else {
                    multiply_tiles<kLastRows, 2>(high, across, tiles, sums + i * wide + o, wide, add);
                    i += kLastRows;
                }
            }
        if (o < wide)
            for (int64_t i = 0; i < part.inputs; i += kRowsNarrow)
                multiply_tiles<kRowsNarrow, 1>(v + place_of(i), w + place_of(o), tiles, sums + i * wide + o, wide, add);
    }
}

// What a thread works in.
struct Scratch {
    float *v, *w;  // 36 winograd_step(channels) floats
    const float* zeros;
    float* bias;  // of a block of tiles
};

// Tiles [begin, end) of some inputs and outputs, at most kTiles: added to sums [36][inputs][outputs], both rounded up
// to 16 and sums_step apart, and to the sums of grad_output's pixels. The first block of a chunk of tiles finds no
// sums.
static void winograd_grad_block(const WinogradGradWeight& call, const WinogradGradPart& part, int64_t begin,
                                int64_t end, bool first, const Scratch& scratch, float* sums, float* bias) {
    const int64_t v_step = winograd_step(part.inputs), w_step = winograd_step(part.outputs);
    const int64_t wide = round_up(part.outputs);
    const Tiles tiles = {(call.height + 3) / 4, (call.width + 3) / 4};
    const Channels x = {call.x + part.first_input, call.height, call.width, call.inputs};
    const Channels y = {call.grad_output + part.first_output, call.height, call.width, call.outputs};
    for (int64_t o = 0; o < wide; ++o) scratch.bias[o] = 0.0f;
    Tile tile = tile_at(tiles, begin), ahead = tile_at(tiles, begin + kReadAhead);
    for (int64_t t = 0; t < (end - begin) * kGroup; t += kGroup) {
        prefetch_tile(x, ahead, part.inputs);
        prefetch_tile(y, ahead, part.outputs);
        transform_tile(x, part.inputs, tile, scratch.zeros, scratch.v + t, v_step);
        transform_grad(y, part.outputs, tile, scratch.zeros, scratch.w + t, w_step, scratch.bias);
        tile = next_tile(tiles, tile), ahead = next_tile(tiles, ahead);
    }
    for (int64_t o = 0; o < wide; ++o) bias[o] = first ? scratch.bias[o] : bias[o] + scratch.bias[o];
    multiply_places(part, end - begin, scratch.v, scratch.w, sums, !first);
}

// G^T s, of 6 numbers.
KR_FN void transform_filter(const f32v* s, f32v* out) {
    constexpr float kC = 1.0f / (kA2 * kB2), kCA = 0.5f / (kA2 * (kA2 - kB2)), kCB = 0.5f / (kB2 * (kB2 - kA2));
    const f32v sum_a = splat(kCA) * (s[1] + s[2]), difference_a = splat(kCA * kA) * (s[1] - s[2]);
    const f32v sum_b = splat(kCB) * (s[3] + s[4]), difference_b = splat(kCB * kB) * (s[3] - s[4]);
    out[0] = fma(splat(kC), s[0], sum_a + sum_b);
    out[1] = difference_a + difference_b;
    out[2] = fma(splat(kA2), sum_a, fma(splat(kB2), sum_b, s[5]));
}

// The taps of one input and a vector of outputs, from the sums of `chunks` chunks: `from` is the first of 36 numbers
// that lie `place` floats apart, `step` from one chunk to the next.
KR_FN void filter_taps(const float* from, int64_t place, int64_t chunks, int64_t step, f32v (&taps)[9]) {
    f32v rows[6][3], across[3];
    KR_UNROLL for (int down = 0; down < 6; ++down) {
        f32v row[6];
        KR_UNROLL for (int j = 0; j < 6; ++j, from += place) {
            row[j] = load(from);
            for (int64_t chunk = 1; chunk < chunks; ++chunk) row[j] = row[j] + load(from + chunk * step);
        }
        transform_filter(row, rows[down]);
    }
    KR_UNROLL for (int j = 0; j < 3; ++j) {
        f32v column[6];
        KR_UNROLL for (int down = 0; down < 6; ++down) column[down] = rows[down][j];
        transform_filter(column, across);
        KR_UNROLL for (int k = 0; k < 3; ++k) taps[3 * k + j] = across[k];
    }
}

// A vector of filters whose taps lie side by side, `apart` floats from one to the next.
KR_FN void store_filters(const f32v (&taps)[9], int live, float* to, int64_t apart) {
    constexpr int kWhole = kLanes < 9 ? kLanes : 9;  // taps in a turned vector
    f32v turned[kLanes];
    KR_UNROLL for (int k = 0; k < kLanes; ++k) turned[k] = k < 9 ? taps[k < 9 ? k : 0] : splat(0.0f);
    transpose(turned);
    alignas(64) float last[kLanes];
    store(last, taps[8]);
    KR_UNROLL for (int lane = 0; lane < kLanes; ++lane, to += apart) if (lane < live) {
        if (kWhole == kLanes)
            store(to, turned[lane]);
        else
            store_part(to, turned[lane], kWhole);
        to[8] = last[lane];
    }
}

// Filters of the inputs [begin, end) of a part, from the sums of `chunks` chunks that lie `step` floats apart.
static void winograd_grad_filters(const WinogradGradWeight& call, const WinogradGradPart& part, int64_t begin,
                                  int64_t end, const float* sums, int64_t chunks, int64_t step) {
    const int64_t wide = round_up(part.outputs), place = sums_step(part);
    for (int64_t i = begin; i < end; ++i)
        for (int64_t o = 0; o < part.outputs; o += kLanes) {
            f32v filter[9];
            filter_taps(sums + i * wide + o, place, chunks, step, filter);
            const int live = part.outputs - o < kLanes ? (int)(part.outputs - o) : kLanes;
            float* to = call.grad_weight + ((part.first_output + o) * 9 * call.inputs) +
                        (part.first_input + i) * call.input_step;
            if (kLanes > 1 && call.tap_step == 1) {
                store_filters(filter, live, to, 9 * call.inputs);
                continue;
            }
            alignas(64) float taps[9][kLanes];
            KR_UNROLL for (int k = 0; k < 9; ++k) store(taps[k], filter[k]);
            for (int lane = 0; lane < live; ++lane, to += 9 * call.inputs)
                for (int k = 0; k < 9; ++k) to[k * call.tap_step] = taps[k][lane];
        }
}

// The sum of the squares of a part's filters, from one chunk. Channels beyond the last are zeros.
static double winograd_grad_squares(const WinogradGradPart& part, const float* sums) {
    const int64_t wide = round_up(part.outputs), place = sums_step(part);
    f64v square[2] = {};
    for (int64_t i = 0; i < part.inputs; ++i)
        for (int64_t o = 0; o < part.outputs; o += kLanes) {
            f32v filter[9];
            filter_taps(sums + i * wide + o, place, 1, 0, filter);
            KR_UNROLL for (int k = 0; k < 9; ++k) add_squares(square, filter[k]);
        }
    return reduce_sum(square[0] + square[1]);
}
#undef KR_APART
