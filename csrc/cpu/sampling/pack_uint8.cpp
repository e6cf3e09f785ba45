#include "cpu/sampling/pack_uint8.h"

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/sampling/pack_uint8_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

void pack_uint8(const float* x, int64_t batch, int64_t channels, int64_t pixels, bool channels_last, uint8_t* out,
                int threads) {
    const int64_t numel = channels * pixels;
    parallel_for(batch, (1 << 14) / (numel + 1) + 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t image = first; image < last; ++image)
            KR_DISPATCH(pack_image, x + image * numel, channels_last ? 1 : channels, channels_last ? numel : pixels,
                        out + image * numel);
    });
}

}  // namespace kr
