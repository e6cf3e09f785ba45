#include "cpu/distillation/distillation_loss.h"

#include <algorithm>
#include <vector>

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/distillation/distillation_loss_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {
namespace {

constexpr int64_t kBlockRows = scalar::kBlockRows;

// The first row whose label is neither a class nor ignore_index, or -1; `counted` becomes the number of the others.
int64_t check_labels(const DistillationLoss& call, int64_t& counted) {
    counted = call.rows;
    if (!call.labels) return -1;
    int64_t invalid = 0, ignored = 0;  // without a branch in the loop, so that it is vectorised
    const uint64_t classes = static_cast<uint64_t>(call.classes);
    for (int64_t row = 0; row < call.rows; ++row) {
        const int64_t skip = call.labels[row] == call.ignore_index;
        ignored += skip;
        invalid |= (static_cast<uint64_t>(call.labels[row]) >= classes) & (skip ^ 1);
    }
    counted -= ignored;
    for (int64_t row = 0; invalid && row < call.rows; ++row)
        if (static_cast<uint64_t>(call.labels[row]) >= classes && call.labels[row] != call.ignore_index) return row;
    return -1;
}

int64_t first_index_outside(const DistillationLoss& call) {
    if (!call.indices) return -1;
    const uint64_t classes = static_cast<uint64_t>(call.classes);
    for (int64_t at = 0; at < call.rows * call.top_k; ++at)
        if (static_cast<uint64_t>(call.indices[at]) >= classes) return at / call.top_k;
    return -1;
}

double sum_of_weights(const DistillationLoss& call, int64_t counted) {
    if (!call.weight) return static_cast<double>(counted);
    double sum = 0;
    for (int64_t row = 0; row < call.rows; ++row)
        if (!call.labels || call.labels[row] != call.ignore_index) sum += call.weight[row];
    return sum;
}

// Blocks a thread should get at least: waking a second thread costs about as much as 16k elements.
int64_t grain(const DistillationLoss& call) { return (int64_t{1} << 14) / (kBlockRows * call.classes) + 1; }

}  // namespace

DistillationResult distillation_loss(const DistillationLoss& call, const DistillationRequest& request, int threads) {
    int64_t counted;
    DistillationResult result{0.0, check_labels(call, counted)};
    if (result.invalid < 0) result.invalid = first_index_outside(call);
    if (result.invalid >= 0) return result;
    double scale = 1;
    if (call.mean) {
        const double weights = sum_of_weights(call, counted);
        scale = weights > 0 ? 1 / weights : 0;
    }
    const int64_t blocks = (call.rows + kBlockRows - 1) / kBlockRows;
    std::vector<double> sums(static_cast<size_t>(blocks));
    parallel_for(blocks, grain(call), threads, [&](int64_t first, int64_t last) {
        std::vector<float> work(scalar::across_lanes(call) ? 0 : static_cast<size_t>(5 * call.classes));
        for (int64_t block = first; block < last; ++block) {
            const int64_t begin = block * kBlockRows, end = std::min(begin + kBlockRows, call.rows);
            sums[static_cast<size_t>(block)] = KR_DISPATCH(loss_block, call, request, scale, begin, end, work.data());
        }
    });
    for (double sum : sums) result.loss += sum;
    result.loss *= scale;
    return result;
}

}  // namespace kr
