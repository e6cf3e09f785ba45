#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

// out[n, t, h] = sum_s softmax_s(q[n, t, h] . k[n, s, h] / sqrt(d)) v[n, s, h]. qkv is [batch, tokens, 3, heads, d] and
// out [batch, tokens, heads, d], both contiguous and of type `dtype`; d is 8, 16, 32 or 64.
void qkv_attention(const void* qkv, Dtype dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t d, void* out,
                   int threads);

}  // namespace kr
