#include "cpu/nn/winograd_conv2d.h"

#include <memory>

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/nn/kernels/winograd_conv2d_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

void winograd_conv2d(const WinogradConv& call, int threads) {
    const int64_t down = (call.height + 3) / 4, across = (call.width + 3) / 4, count = call.batch * down * across;
    const int64_t block = winograd_block(call.outputs), empty = 6 * call.inputs + 16;
    const int64_t transformed = 36 * winograd_step(call.inputs);
    const int64_t products = 36 * kWinogradTiles * kWinogradPart * block;
    const int64_t rows = block == 16 ? 21 : 14;  // tiles of the widest product: threads share whole ones
    parallel_for((count + rows - 1) / rows, 1, threads, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> memory(new float[transformed + products + empty + 16]);
        float* v = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / 4;
        float *m = v + transformed, *zeros = m + products;
        for (int64_t i = 0; i < empty; ++i) zeros[i] = 0.0f;
        const int64_t last = end * rows < count ? end * rows : count;
        for (int64_t b = begin * rows; b < last; b += kWinogradTiles)
            KR_DISPATCH(winograd_block_of_tiles, call, {down, across}, b,
                        b + kWinogradTiles < last ? b + kWinogradTiles : last, v, m, zeros);
    });
}

}  // namespace kr
