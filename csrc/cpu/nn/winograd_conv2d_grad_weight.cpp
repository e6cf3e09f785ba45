#include "cpu/simd/parallel.h"
#include "cpu/simd/aligned_floats.h"
#include "cpu/nn/winograd_conv2d.h"

namespace kr {
namespace {

// What one thread sums over a chunk of tiles: some inputs by some outputs.
struct WinogradGradPart {
    int64_t first_input, inputs, first_output, outputs;
};

}  // namespace
}  // namespace kr

#define KR_KERNEL "cpu/nn/kernels/winograd_conv2d_grad_weight_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {
namespace {

// Channels of a part and tiles of a block: the part's sums [36][channels][channels] and a block of transformed tiles
// stay in the second-level cache, of 1 to 2 MB where there is AVX-512 and of 512 KB where there is not.
constexpr int64_t kPart = 64, kSmallPart = 32, kSmallBlock = 28;
int64_t part_channels() { return isa() == Isa::avx512 ? kPart : kSmallPart; }
int64_t block_tiles() { return isa() == Isa::avx512 ? kWinogradTiles : kSmallBlock; }
// Partial sums are added in the order of their chunks, whose number depends on the shape only: a chunk has at least so
// many tiles, for a sum costs as much as ten, and all sums are 2.5 MB where that leaves two chunks.
constexpr int64_t kMostChunks = 16, kFewestTiles = 128, kMostSums = 640 * 1024;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How the channels of a gradient are cut into parts.
struct Parts {
    Parts(int64_t inputs, int64_t outputs)
        : inputs(inputs),
          outputs(outputs),
          most(part_channels()),
          across((outputs + most - 1) / most),
          count((inputs + most - 1) / most * across),
          high(smaller(round_up(inputs, 16), most)),
          wide(smaller(round_up(outputs, 16), most)),
          size(36 * (high * wide + 16)) {}
    WinogradGradPart at(int64_t number) const {
        const int64_t input = number / across * most, output = number % across * most;
        return {input, smaller(inputs - input, most), output, smaller(outputs - output, most)};
    }
    const int64_t inputs, outputs, most, across, count, high, wide, size;  // size: floats of the sums of a part
};

int64_t zero_pixels(const WinogradGradWeight& call) {
    return round_up(6 * (call.inputs > call.outputs ? call.inputs : call.outputs) + 16, 16);
}

// Tiles [from, to), in blocks of equal size, added to `sums` and `bias`, of which the first finds none.
void add_tiles(const WinogradGradWeight& call, const Parts& parts, const WinogradGradPart& part, int64_t from,
               int64_t to, bool first, float* scratch, float* sums, float* bias) {
    float *v = scratch, *w = v + 36 * winograd_step(parts.high), *block_bias = w + 36 * winograd_step(parts.wide);
    float* zeros = block_bias + kPart;
    for (int64_t i = 0; i < zero_pixels(call); ++i) zeros[i] = 0.0f;
    const int64_t blocks = (to - from + block_tiles() - 1) / block_tiles();
    for (int64_t block = 0; block < blocks; ++block)
        KR_DISPATCH(winograd_grad_block, call, part, from + (to - from) * block / blocks,
                    from + (to - from) * (block + 1) / blocks, first && block == 0, {v, w, zeros, block_bias}, sums,
                    bias);
}

int64_t scratch_size(const WinogradGradWeight& call, const Parts& parts) {
    return 36 * (winograd_step(parts.high) + winograd_step(parts.wide)) + kPart + zero_pixels(call);
}

int64_t tiles_of(const WinogradGradWeight& call) {
    return call.batch * ((call.height + 3) / 4) * ((call.width + 3) / 4);
}

}  // namespace

int64_t winograd_grad_chunks(int64_t inputs, int64_t outputs, int64_t tiles) {
    const Parts parts(inputs, outputs);
    int64_t chunks = tiles >= kFewestTiles ? 2 : 1;
    while (2 * chunks <= kMostChunks && 2 * chunks * parts.count * parts.size <= kMostSums &&
           tiles >= 2 * chunks * kFewestTiles)
        chunks *= 2;
    return chunks;
}

int64_t winograd_grad_sums(int64_t inputs, int64_t outputs) {
    const Parts parts(inputs, outputs);
    return parts.count * parts.size;
}

int64_t winograd_grad_scratch(int64_t inputs, int64_t outputs) {
    WinogradGradWeight call = {};
    call.inputs = inputs, call.outputs = outputs;
    return scratch_size(call, Parts(inputs, outputs)) + kPart;
}

void winograd_grad_add(const WinogradGradWeight& call, bool first, float* sums, float* scratch) {
    const Parts parts(call.inputs, call.outputs);
    float* bias = scratch + scratch_size(call, parts);
    for (int64_t number = 0; number < parts.count; ++number)
        add_tiles(call, parts, parts.at(number), 0, tiles_of(call), first, scratch, sums + number * parts.size, bias);
}

void winograd_grad_finish(const WinogradGradWeight& call, const float* sums, int64_t chunks, int threads) {
    const Parts parts(call.inputs, call.outputs);
    parallel_for(call.inputs, 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t number = 0; number < parts.count; ++number) {
            const WinogradGradPart part = parts.at(number);
            const int64_t low = begin - part.first_input, last = end - part.first_input;
            KR_DISPATCH(winograd_grad_filters, call, part, low > 0 ? low : 0, smaller(last, part.inputs),
                        sums + number * parts.size, chunks, parts.count * parts.size);
        }
    });
}

int64_t winograd_grad_alone_memory(int64_t inputs, int64_t outputs) {
    return Parts(inputs, outputs).size + winograd_grad_scratch(inputs, outputs);
}

double winograd_grad_alone(const WinogradGradWeight& call, float* memory) {
    const Parts parts(call.inputs, call.outputs);
    float *sums = memory, *scratch = sums + parts.size, *bias = scratch + scratch_size(call, parts);
    double square = 0.0;
    for (int64_t number = 0; number < parts.count; ++number) {
        const WinogradGradPart part = parts.at(number);
        add_tiles(call, parts, part, 0, tiles_of(call), true, scratch, sums, bias);
        if (call.grad_weight)
            KR_DISPATCH(winograd_grad_filters, call, part, 0, part.inputs, sums, 1, 0);
        else
            square += KR_DISPATCH(winograd_grad_squares, part, sums);
    }
    return square;
}

void winograd_conv2d_grad_weight(const WinogradGradWeight& call, int threads) {
    const Parts parts(call.inputs, call.outputs);
    const int64_t tiles = tiles_of(call), chunks = winograd_grad_chunks(call.inputs, call.outputs, tiles);
    const AlignedFloats memory(chunks * (parts.count * parts.size + parts.across * parts.most));
    float *sums = memory.floats, *bias = sums + chunks * parts.count * parts.size;  // [chunks][across][most]
    parallel_for(chunks * parts.count, 1, threads, [&](int64_t begin, int64_t end) {
        const AlignedFloats own(scratch_size(call, parts) + kPart);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t chunk = task / parts.count, number = task % parts.count;
            float* to_bias = number < parts.across ? bias + (chunk * parts.across + number) * parts.most
                                                   : own.floats + scratch_size(call, parts);
            add_tiles(call, parts, parts.at(number), tiles * chunk / chunks, tiles * (chunk + 1) / chunks, true,
                      own.floats, sums + task * parts.size, to_bias);
        }
    });
    winograd_grad_finish(call, sums, chunks, threads);
    if (call.grad_bias == nullptr) return;
    for (int64_t o = 0; o < call.outputs; ++o) {
        float sum = 0.0f;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += bias[chunk * parts.across * parts.most + o];
        call.grad_bias[o] = sum;
    }
}

}  // namespace kr
