#include "cpu/distillation_metrics.h"

#include <vector>

#include "cpu/parallel.h"

#define KR_KERNEL "cpu/distillation_metrics_kernel.h"
#include "cpu/foreach_isa.h"

namespace kr {

void distillation_metrics(const DistillationMetrics& call, int threads) {
    parallel_for(call.rows, (1 << 13) / call.classes + 1, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> work(static_cast<size_t>(4 * call.classes));
        for (int64_t row = begin; row < end; ++row) KR_DISPATCH(metrics_row, call, row, work.data());
    });
}

}  // namespace kr
