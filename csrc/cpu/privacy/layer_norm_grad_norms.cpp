#include "cpu/privacy/layer_norm_grad_norms.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/privacy/layer_norm_grad_norms_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

static constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

void layer_norm_grad_norms(const LayerNormGradNorms& call, int threads) {
    const int64_t room = call.size + 16;
    parallel_for(call.records, kGrain / (call.rows * call.size + 1) + 1, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> sums(2 * room);
        float *weight = sums.data(), *bias = weight + room;
        for (int64_t record = begin; record < end; ++record) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            KR_DISPATCH(layer_norm_record, call, record, weight, bias);
            double square = 0.0;
            for (int64_t i = 0; i < call.size; ++i) {
                square += (double)weight[i] * (double)weight[i];
                if (call.with_bias) square += (double)bias[i] * (double)bias[i];
            }
            if (call.norms) call.norms[record] = (float)std::sqrt(square);
            if (call.weight) std::copy(weight, weight + call.size, call.weight + record * call.size);
            if (call.bias) std::copy(bias, bias + call.size, call.bias + record * call.size);
        }
    });
}

}  // namespace kr
