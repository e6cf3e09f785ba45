#include "cpu/distillation/distillation_metrics.h"

#include <algorithm>
#include <vector>

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/distillation/distillation_metrics_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

void distillation_metrics(const DistillationMetrics& call, int threads) {
    const int64_t step =
        call.classes > scalar::kLaneClasses ? 1 : 64;  // a multiple of every lane count, or single rows
    const int64_t blocks = (call.rows + step - 1) / step;
    parallel_for(blocks, (1 << 13) / (step * call.classes) + 1, threads, [&](int64_t first, int64_t last) {
        std::vector<float> work(static_cast<size_t>(call.classes > scalar::kLaneClasses ? 4 * call.classes : 0));
        for (int64_t block = first; block < last; ++block)
            KR_DISPATCH(metrics_block, call, block * step, std::min((block + 1) * step, call.rows), work.data());
    });
}

}  // namespace kr
