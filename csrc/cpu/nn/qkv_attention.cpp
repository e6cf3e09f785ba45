#include "cpu/nn/qkv_attention.h"

#include <vector>

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/nn/qkv_attention_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

void qkv_attention(const void* qkv, Dtype dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t d, void* out,
                   int threads) {
    const int64_t work = tokens * tokens * d + 1;  // multiply-adds of a head, twice
    parallel_for(batch * heads, (1 << 16) / work + 1, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(3 * ((tokens + 31) / 32 * 32) * d);
        for (int64_t item = begin; item < end; ++item)
            KR_DISPATCH(attention_item, qkv, dtype, item, tokens, heads, d, out, scratch.data());
    });
}

}  // namespace kr
