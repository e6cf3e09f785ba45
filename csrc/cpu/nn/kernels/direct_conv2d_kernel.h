// Included once per instruction set by direct_conv2d.cpp.
//
// A convolution as products of patches with filters. A row is a pixel of the result, and a tile some rows that take the
// same taps: what is outside of the image is in no sum, and there is nothing to test in the loop over taps and
// channels. There a number of each row's patch, which is read where it lies, is broadcast and multiplied with as many
// vectors of outputs as the registers hold. Filters are packed as [block of outputs][tap][channel][outputs of a block].
// A few outputs would leave most of a vector empty: they are sums over vectors of channels, with filters
// [output][tap][channel].
#define KR_APART __attribute__((noinline))
#define KR_UNROLL_ROWS _Pragma("GCC unroll 32")

#include "cpu/nn/kernels/direct_conv2d_filters_kernel.h"
#include "cpu/nn/kernels/direct_conv2d_grad_weight_kernel.h"

// Rows and vectors of outputs of a product that the registers hold; narrow: with one vector of outputs in all.
#if KR_LANES == 16
constexpr int kRows = 14, kVectors = 2, kNarrowRows = 28;
#elif KR_LANES == 8
constexpr int kRows = 6, kVectors = 2, kNarrowRows = 6;
#else
constexpr int kRows = 2, kVectors = 4, kNarrowRows = 2;
#endif
constexpr int kMostRows = kNarrowRows > kLanes ? kNarrowRows : kLanes;
constexpr int64_t kFold = 96;  // terms of a sum before it is added to a total: that bounds the error of long sums

// One tile: where its patches and results lie, and the taps that it takes.
struct Tile {
    const float* from[kMostRows];
    int64_t to[kMostRows];
    int64_t taps_y, length, line;       // length is taps_x by channels; floats from one line of the source to the next
    int64_t first_weight, weight_step;  // in channels of packed filters: the first, from one line of taps to the next
};

// What all tiles of a pass are given.
struct Target {
    const float *weight, *bias;  // bias of all outputs or null
    float* y;
    bool accumulate;
};

template <int rows, int vectors>
static KR_APART void multiply(const Tile& tile, int live_rows, const Target& target, const float* weight, int64_t block,
                              int64_t output, int64_t live) {
    int counts[vectors];
    f32v sum[rows][vectors];
    KR_UNROLL for (int v = 0; v < vectors; ++v) {
        const int64_t left = live - v * kLanes;
        counts[v] = left < 0 ? 0 : left < kLanes ? (int)left : kLanes;
        const f32v first =
            target.bias && counts[v] ? load_part(target.bias + output + v * kLanes, counts[v], 0.0f) : splat(0.0f);
        KR_UNROLL_ROWS for (int r = 0; r < rows; ++r) sum[r][v] = first;
    }
    alignas(64) float total[rows * vectors * kLanes];
    bool folded = false;
    const int64_t pieces = (tile.length + kFold - 1) / kFold, piece = pieces ? (tile.length + pieces - 1) / pieces : 0;
    for (int64_t k = 0, terms = 0; k < tile.taps_y; ++k) {
        const float* b = weight + k * tile.weight_step * block;
        const int64_t last = k * tile.line + tile.length;
        for (int64_t c = k * tile.line; c < last; terms += piece) {
            if (terms + piece > kFold) {
                KR_UNROLL_ROWS for (int r = 0; r < rows; ++r) KR_UNROLL for (int v = 0; v < vectors; ++v) {
                    float* to = total + (r * vectors + v) * kLanes;
                    store(to, folded ? load(to) + sum[r][v] : sum[r][v]);
                    sum[r][v] = splat(0.0f);
                }
                terms = 0, folded = true;
            }
            for (const int64_t stop = last - c < piece ? last : c + piece; c < stop; ++c, b += block) {
                f32v w[vectors];
                KR_UNROLL for (int v = 0; v < vectors; ++v) w[v] = load(b + v * kLanes);
                KR_UNROLL_ROWS for (int r = 0; r < rows; ++r) {
                    const f32v value = splat(tile.from[r][c]);
                    KR_UNROLL for (int v = 0; v < vectors; ++v) sum[r][v] = fma(value, w[v], sum[r][v]);
                }
            }
        }
    }
    if (folded)
        KR_UNROLL_ROWS for (int r = 0; r < rows; ++r) KR_UNROLL for (int v = 0; v < vectors; ++v) sum[r][v] =
            sum[r][v] + load(total + (r * vectors + v) * kLanes);
    float* y = target.y + output;
    if (live == vectors * kLanes && !target.accumulate) {
        KR_UNROLL_ROWS for (int r = 0; r < rows; ++r) {
            if (r >= live_rows) return;
            KR_UNROLL for (int v = 0; v < vectors; ++v) store(y + tile.to[r] + v * kLanes, sum[r][v]);
        }
        return;
    }
    KR_UNROLL_ROWS for (int r = 0; r < rows; ++r) {
        if (r >= live_rows) return;
        KR_UNROLL for (int v = 0; v < vectors; ++v) {
            if (counts[v] == 0) continue;
            float* to = y + tile.to[r] + v * kLanes;
            store_part(to, target.accumulate ? load_part(to, counts[v], 0.0f) + sum[r][v] : sum[r][v], counts[v]);
        }
    }
}

// All outputs of one tile.
template <int rows>
static void multiply_blocks(const DirectPass& pass, const Tile& tile, int live_rows, const Target& target) {
    const int64_t filter = pass.taps_y * pass.taps_x * pass.channels;
    for (int64_t first = 0; first < pass.to_channels;) {
        const int64_t left = pass.to_channels - first, block = left > 16 ? 32 : 16;
        const float* w = target.weight + first * filter + tile.first_weight * block;
        for (int64_t o = 0; o < block && o < left;) {
            const int64_t wide = left - o;
            if constexpr (rows <= kRows) {
                if (block - o >= kVectors * kLanes) {
                    const int64_t live = wide < kVectors * kLanes ? wide : kVectors * kLanes;
                    multiply<rows, kVectors>(tile, live_rows, target, w + o, block, first + o, live);
                    o += kVectors * kLanes;
                    continue;
                }
            }
            multiply<rows, 1>(tile, live_rows, target, w + o, block, first + o, wide < kLanes ? wide : kLanes);
            o += kLanes;
        }
        first += block;
    }
}

// The product with the fewest rows that takes them, in steps of two.
template <int rows>
KR_FN void multiply_tile(const DirectPass& pass, const Tile& tile, int live_rows, const Target& target) {
    if constexpr (rows > 2) {
        if (live_rows <= rows - 2) return multiply_tile<rows - 2>(pass, tile, live_rows, target);
    }
    multiply_blocks<rows>(pass, tile, live_rows, target);
}

// A few outputs of kLanes rows.
static KR_APART void sum_channels(const DirectPass& pass, const Tile& tile, int live_rows, const Target& target) {
    const int64_t filter = pass.taps_y * pass.taps_x * pass.channels;
    for (int64_t o = 0; o < pass.to_channels; ++o) {
        f32v sum[kLanes] = {};
        for (int64_t k = 0; k < tile.taps_y; ++k) {
            const float* w = target.weight + o * filter + tile.first_weight + k * tile.weight_step;
            const int64_t line = k * tile.line;
            int64_t c = 0;
            for (; c + kLanes <= tile.length; c += kLanes) {
                const f32v factor = load(w + c);
                KR_UNROLL for (int r = 0; r < kLanes; ++r) sum[r] = fma(load(tile.from[r] + line + c), factor, sum[r]);
            }
            if (c < tile.length) {
                const int live = (int)(tile.length - c);
                const f32v factor = load_part(w + c, live, 0.0f);
                KR_UNROLL for (int r = 0; r < kLanes; ++r) sum[r] =
                    fma(load_part(tile.from[r] + line + c, live, 0.0f), factor, sum[r]);
            }
        }
        alignas(64) float result[kLanes];
        store(result, sum_rows(sum) + splat(target.bias ? target.bias[o] : 0.0f));
        for (int r = 0; r < live_rows; ++r) {
            float* to = target.y + tile.to[r] + o;
            *to = target.accumulate ? *to + result[r] : result[r];
        }
    }
}

// Into the cache what `count` floats at `from` touch, to be read or written.
template <int write>
KR_FN void prefetch(const float* from, int64_t count) {
    for (int64_t c = 0; c < count; c += 16) __builtin_prefetch(from + c, write);
}

// Rows of a run, of images [begin, end).
static void direct_run(const DirectPass& pass, const DirectRun& down, const DirectRun& across, const float* source,
                       const float* weight, const float* bias, float* y, bool accumulate, int64_t begin, int64_t end) {
    const Target target = {weight, bias, y, accumulate};
    const int64_t c = pass.channels, taps_x = across.last_tap - across.first_tap;
    const bool few = has_few_outputs(pass);
    Tile tile;
    tile.taps_y = taps_x ? down.last_tap - down.first_tap : 0, tile.length = taps_x * c, tile.line = pass.width * c;
    tile.first_weight = (down.first_tap * pass.taps_x + across.first_tap) * c, tile.weight_step = pass.taps_x * c;
    const int64_t from_step = pass.step_x * c, to_step = pass.to_step_x * pass.to_channels;
    const int most = few ? kLanes : pass.to_channels <= kLanes ? kNarrowRows : kRows;
    int64_t left = (end - begin) * (down.last - down.first) * (across.last - across.first);
    const int64_t fresh = pass.step_y < tile.taps_y ? pass.step_y : tile.taps_y;
    int64_t n = begin, i = down.first, j = across.last, to = 0;
    const float* from = source;
    for (int live; left > 0; left -= live) {
        live = left < most ? (int)left : most;
        for (int r = 0; r < live; ++r, ++j, from += from_step, to += to_step) {
            if (j == across.last) {
                j = across.first;
                const int64_t top = i * pass.step_y + pass.origin_y + down.first_tap;
                const int64_t start = j * pass.step_x + pass.origin_x + across.first_tap;
                from = source + (tile.taps_y ? ((n * pass.height + top) * pass.width + start) * c : 0);
                to = ((n * pass.to_height + i * pass.to_step_y + pass.to_first_y) * pass.to_width + j * pass.to_step_x +
                      pass.to_first_x) *
                     pass.to_channels;
                if (++i == down.last) i = down.first, ++n;
            }
            tile.from[r] = from;
            tile.to[r] = to;
            // Of the next tile what is new to it; a line ends with the next one's beginning.
            for (int64_t k = tile.taps_y - fresh; k < tile.taps_y; ++k)
                prefetch<0>(from + k * tile.line + tile.length - c + most * from_step, from_step);
            prefetch<1>(y + to + most * to_step, pass.to_channels);
        }
        // Rows that are computed and not stored.
        for (int r = live; r < (few ? kLanes : (live + 1) / 2 * 2); ++r) tile.from[r] = tile.from[0];
        if (few)
            sum_channels(pass, tile, live, target);
        else
            multiply_tile<kNarrowRows>(pass, tile, live, target);
    }
}
#undef KR_APART
#undef KR_UNROLL_ROWS
