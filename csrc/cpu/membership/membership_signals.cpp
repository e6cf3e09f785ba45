#include "cpu/membership/membership_signals.h"

#include <algorithm>
#include <vector>

#include "common/dtype.h"
#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/membership/membership_signals_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

void membership_signals(const MembershipSignals& call, int threads) {
    const int64_t rows = call.rows, classes = call.classes;
    const int64_t step = classes > scalar::kLaneClasses ? 1 : 64;  // a multiple of every lane count, or single rows
    const int64_t blocks = (rows + step - 1) / step;
    parallel_for(blocks, (1 << 13) / (step * classes) + 1, threads, [&](int64_t first, int64_t last) {
        std::vector<float> work(static_cast<size_t>(classes > scalar::kLaneClasses ? classes : 0));
        for (int64_t row = first * step; row < last * step && row < rows; row += step)
            KR_DISPATCH(signals_block, call, row, std::min(step, rows - row), work.data());
    });
}

}  // namespace kr
