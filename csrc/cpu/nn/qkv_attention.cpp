#include "cpu/nn/qkv_attention.h"

#include <vector>

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/nn/kernels/qkv_attention_backward_kernel.h"  // and that of the forward pass
#include "cpu/simd/foreach_isa.h"

namespace kr {

// item(i, scratch) for each head of each image; scratch: `rows` rows of d floats for each token, and as many for the
// last tile of 32 keys and of queries, from the start of a cache line.
template <class Call, class Item>
static void for_each_head(const Call& call, int64_t rows, int threads, const Item& item) {
    const int64_t tokens = call.tokens, d = call.head_channels;
    const int64_t work = tokens * tokens * d + 1;  // multiply-adds of a product
    parallel_for(call.batch * call.heads, (1 << 16) / work + 1, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(rows * ((tokens + 31) / 32 * 32) * d + 16);
        float* aligned = scratch.data() + (-reinterpret_cast<uintptr_t>(scratch.data()) % 64) / sizeof(float);
        for (int64_t i = begin; i < end; ++i) item(i, aligned);
    });
}

void qkv_attention(const QkvAttention& call, int threads) {
    for_each_head(call, 3, threads,
                  [&](int64_t item, float* scratch) { KR_DISPATCH(attention_item, call, item, scratch); });
}

void qkv_attention_backward(const QkvAttentionBackward& call, int threads) {
    for_each_head(call, 11, threads,
                  [&](int64_t item, float* scratch) { KR_DISPATCH(attention_backward_item, call, item, scratch); });
}

}  // namespace kr
