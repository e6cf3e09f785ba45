#include "cpu/distillation_loss.h"

#include <vector>

#include "cpu/parallel.h"

#define KR_KERNEL "cpu/distillation_loss_kernel.h"
#include "cpu/foreach_isa.h"

namespace kr {
namespace {

constexpr int64_t kBlockRows = 64;

bool ignored(const DistillationLoss& call, int64_t row) {
    return call.labels != nullptr && call.labels[row] == call.ignore_index;
}
float weight_of(const DistillationLoss& call, int64_t row) {
    return ignored(call, row) ? 0.0f : call.weight ? call.weight[row] : 1.0f;
}

// Blocks a thread should get at least: waking a second thread costs about as much as 16k elements.
int64_t grain(const DistillationLoss& call) { return (int64_t{1} << 14) / (kBlockRows * call.classes) + 1; }

template <class Body>
void over_blocks(const DistillationLoss& call, int threads, const Body& body) {
    const int64_t blocks = (call.rows + kBlockRows - 1) / kBlockRows;
    const int64_t scratch = call.classes <= 32 ? 0 : 4 * call.classes;
    parallel_for(blocks, grain(call), threads, [&](int64_t first, int64_t last) {
        std::vector<float> work(static_cast<size_t>(scratch));
        for (int64_t block = first; block < last; ++block) {
            const int64_t begin = block * kBlockRows;
            body(block, begin, begin + kBlockRows < call.rows ? begin + kBlockRows : call.rows, work.data());
        }
    });
}

}  // namespace

int64_t distillation_forward(const DistillationLoss& call, float* row_loss, float* stats, double total[2], int threads) {
    if (call.labels)
        for (int64_t row = 0; row < call.rows; ++row)
            if ((call.labels[row] < 0 || call.labels[row] >= call.classes) && !ignored(call, row)) return row;
    const int64_t blocks = (call.rows + kBlockRows - 1) / kBlockRows;
    std::vector<double> sums(static_cast<size_t>(2 * blocks));
    over_blocks(call, threads, [&](int64_t block, int64_t begin, int64_t end, float* work) {
        KR_DISPATCH(forward_range, call, begin, end, row_loss, stats, work);
        double loss = 0, weights = 0;
        for (int64_t row = begin; row < end; ++row) {
            // A row of weight 0 contributes 0 whatever its logits hold.
            const float w = weight_of(call, row);
            row_loss[row] = w == 0.0f ? 0.0f : w * row_loss[row];
            loss += row_loss[row], weights += w;
        }
        sums[2 * block] = loss, sums[2 * block + 1] = weights;
    });
    total[0] = total[1] = 0;
    for (int64_t block = 0; block < blocks; ++block) total[0] += sums[2 * block], total[1] += sums[2 * block + 1];
    return -1;
}

void distillation_backward(const DistillationLoss& call, const float* stats, const float* upstream,
                           int64_t upstream_step, float scale, void* grad_input, int threads) {
    over_blocks(call, threads, [&](int64_t, int64_t begin, int64_t end, float* work) {
        float factor[kBlockRows];
        for (int64_t row = begin; row < end; ++row)
            factor[row - begin] = upstream[row * upstream_step] * scale * weight_of(call, row);
        KR_DISPATCH(backward_range, call, stats, factor, begin, end, grad_input, work);
    });
}

}  // namespace kr
