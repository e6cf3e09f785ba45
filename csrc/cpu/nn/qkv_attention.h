#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

// out[n, t, h] = sum_s p[n, h, t, s] v[n, s, h] with p = softmax_s(q[n, t, h] . k[n, s, h] / sqrt(d)). All is
// contiguous.
struct QkvAttention {
    const void* qkv;  // [batch, tokens, 3, heads, d] of type `dtype`
    Dtype dtype;
    int64_t batch, tokens, heads, head_channels;  // d: 8, 16, 32 or 64
    void* out;                                    // [batch, tokens, heads, d]
    float* logsumexp;                             // [batch, heads, tokens], of q . k / sqrt(d) over the keys; or null
};

void qkv_attention(const QkvAttention& call, int threads);

// The gradient of qkv from that of out, and from what the forward pass has written.
struct QkvAttentionBackward {
    const void* qkv;
    Dtype dtype;
    int64_t batch, tokens, heads, head_channels;
    const void *out, *grad_out;  // [batch, tokens, heads, d]
    const float* logsumexp;      // [batch, heads, tokens]
    void* grad_qkv;              // like qkv
};

void qkv_attention_backward(const QkvAttentionBackward& call, int threads);

}  // namespace kr
