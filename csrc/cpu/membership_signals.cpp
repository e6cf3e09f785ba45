#include "cpu/membership_signals.h"

#include "cpu/parallel.h"

#define KR_KERNEL "cpu/membership_signals_kernel.h"
#include "cpu/foreach_isa.h"

namespace kr {

void membership_signals(const float* logits, int64_t rows, int64_t classes, int64_t stride, const int64_t* labels,
                        const SignalOutputs& out, int threads) {
    const int64_t step = 16, blocks = (rows + step - 1) / step;  // a multiple of every lane count
    parallel_for(blocks, (1 << 13) / (step * classes) + 1, threads, [&](int64_t first, int64_t last) {
        const int lanes = isa() == Isa::avx512 ? 16 : isa() == Isa::avx2 ? 8 : 1;
        for (int64_t row = first * step; row < last * step && row < rows; row += lanes) {
            const int count = (int)(rows - row < lanes ? rows - row : lanes);
            KR_DISPATCH(signals_block, logits, classes, stride, labels, row, count, out);
        }
    });
}

}  // namespace kr
