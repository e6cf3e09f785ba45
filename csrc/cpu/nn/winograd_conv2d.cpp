#include "cpu/nn/winograd_conv2d.h"

#include "cpu/simd/parallel.h"
#include "cpu/simd/aligned_floats.h"

#define KR_KERNEL "cpu/nn/kernels/winograd_conv2d_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

int64_t winograd_scratch(int64_t inputs, int64_t outputs) {
    const int64_t transformed = 36 * winograd_step(inputs), empty = (6 * inputs + 31) / 16 * 16;
    return transformed + 36 * kWinogradTiles * kWinogradPart * winograd_block(outputs) + empty;
}

// Tiles of a block: with all of kWinogradTiles, what they are transformed to and the products of one block of outputs
// overflow a second cache of 512 KB, as processors without AVX-512 have it.
static int64_t tiles_of_block(const WinogradConv& call) {
    constexpr int64_t kSmallCache = 75 * 1024, kFewest = 12, kUnit = 6;  // floats; tiles, whole products of all widths
    if (isa() == Isa::avx512) return kWinogradTiles;
    const int64_t each = 36 * ((call.inputs + 15) / 16 * 16 + winograd_block(call.outputs));
    const int64_t fit = kSmallCache / each / kUnit * kUnit;
    return fit < kFewest ? kFewest : fit < kWinogradTiles ? fit : kWinogradTiles;
}

// Tiles [begin, end).
static void winograd_tiles(const WinogradConv& call, int64_t begin, int64_t end, float* scratch) {
    float* m = scratch + 36 * winograd_step(call.inputs);
    float* zeros = m + 36 * kWinogradTiles * kWinogradPart * winograd_block(call.outputs);
    for (int64_t i = 0; i < 6 * call.inputs + 16; ++i) zeros[i] = 0.0f;
    const int64_t block = tiles_of_block(call);
    for (int64_t b = begin; b < end; b += block)
        KR_DISPATCH(winograd_block_of_tiles, call, {(call.height + 3) / 4, (call.width + 3) / 4}, b,
                    b + block < end ? b + block : end, scratch, m, zeros);
}

void winograd_conv2d_within(const WinogradConv& call, float* scratch) {
    winograd_tiles(call, 0, call.batch * ((call.height + 3) / 4) * ((call.width + 3) / 4), scratch);
}

void winograd_conv2d(const WinogradConv& call, int threads) {
    const int64_t count = call.batch * ((call.height + 3) / 4) * ((call.width + 3) / 4);
    const int64_t rows =
        winograd_block(call.outputs) == 16 ? 21 : 14;  // tiles of the widest product: threads share whole ones
    parallel_for((count + rows - 1) / rows, 1, threads, [&](int64_t begin, int64_t end) {
        const AlignedFloats memory(winograd_scratch(call.inputs, call.outputs));
        winograd_tiles(call, begin * rows, end * rows < count ? end * rows : count, memory.floats);
    });
}

}  // namespace kr
