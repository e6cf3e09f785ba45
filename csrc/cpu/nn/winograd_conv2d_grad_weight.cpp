#include <memory>

#include "cpu/simd/parallel.h"
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

// Channels of a part: its sums [36][64][64] and a block of transformed tiles stay in a second-level cache of 1 to 2 MB.
constexpr int64_t kPart = 64;
// Partial sums are added in the order of their chunks, whose number depends on the shape only: a chunk has at least so
// many tiles, for a sum costs as much as ten, and all sums are 2.5 MB where that leaves two chunks.
constexpr int64_t kMostChunks = 16, kFewestTiles = 128, kMostSums = 640 * 1024;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

float* aligned(float* memory) { return memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / 4; }

}  // namespace

void winograd_conv2d_grad_weight(const WinogradGradWeight& call, int threads) {
    const int64_t tiles = call.batch * ((call.height + 3) / 4) * ((call.width + 3) / 4);
    const int64_t down = (call.inputs + kPart - 1) / kPart, across = (call.outputs + kPart - 1) / kPart;
    const int64_t high = smaller(round_up(call.inputs, 16), kPart), wide = smaller(round_up(call.outputs, 16), kPart);
    const int64_t size = 36 * high * wide, parts = down * across;
    int64_t chunks = tiles >= kFewestTiles ? 2 : 1;
    while (2 * chunks <= kMostChunks && 2 * chunks * parts * size <= kMostSums && tiles >= 2 * chunks * kFewestTiles)
        chunks *= 2;
    const auto part_at = [&](int64_t number) {
        const int64_t input = number / across * kPart, output = number % across * kPart;
        return WinogradGradPart{input, smaller(call.inputs - input, kPart), output,
                                smaller(call.outputs - output, kPart)};
    };
    const std::unique_ptr<float[]> memory(new float[chunks * (parts * size + across * kPart) + 16]);
    float *sums = aligned(memory.get()), *bias = sums + chunks * parts * size;  // [chunks][across][kPart]
    parallel_for(chunks * parts, 1, threads, [&](int64_t begin, int64_t end) {
        const int64_t empty = 6 * (call.inputs > call.outputs ? call.inputs : call.outputs) + 16;
        const int64_t v_size = 36 * winograd_step(high), w_size = 36 * winograd_step(wide);
        const std::unique_ptr<float[]> own(new float[v_size + w_size + empty + 2 * kPart + 16]);
        float *v = aligned(own.get()), *w = v + v_size, *block_bias = w + w_size, *zeros = block_bias + 2 * kPart;
        for (int64_t i = 0; i < empty; ++i) zeros[i] = 0.0f;
        for (int64_t task = begin; task < end; ++task) {
            const int64_t chunk = task / parts, number = task % parts;
            const WinogradGradPart part = part_at(number);
            float* to_bias = number < across ? bias + (chunk * across + number) * kPart : block_bias + kPart;
            const int64_t from = tiles * chunk / chunks, to = tiles * (chunk + 1) / chunks;
            const int64_t blocks = (to - from + kWinogradTiles - 1) / kWinogradTiles;
            for (int64_t block = 0; block < blocks; ++block)  // of equal size
                KR_DISPATCH(winograd_grad_block, call, part, from + (to - from) * block / blocks,
                            from + (to - from) * (block + 1) / blocks, block == 0, {v, w, zeros, block_bias},
                            sums + task * size, to_bias);
        }
    });
    parallel_for(call.inputs, 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t number = 0; number < parts; ++number) {
            const WinogradGradPart part = part_at(number);
            const int64_t low = begin - part.first_input, last = end - part.first_input;
            KR_DISPATCH(winograd_grad_filters, call, part, low > 0 ? low : 0, smaller(last, part.inputs),
                        sums + number * size, chunks, parts * size);
        }
    });
    if (call.grad_bias == nullptr) return;
    for (int64_t o = 0; o < call.outputs; ++o) {
        float sum = 0.0f;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += bias[chunk * across * kPart + o];
        call.grad_bias[o] = sum;
    }
}

}  // namespace kr
