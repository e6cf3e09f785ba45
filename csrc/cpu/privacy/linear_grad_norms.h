#pragma once
#include <cstdint>

namespace kr {

// Per-sample gradients of a linear layer's parameters: dw_b[o, i] = sum over positions of b: dy[o] x[i].
struct LinearGradients {
    const float* x;            // [records, positions, inputs]
    const float* grad_output;  // [records, positions, outputs]
    int64_t records, positions, inputs, outputs;
    float* norms;   // [records]: of weight and, with `bias`, bias together; or null
    float* weight;  // [records, outputs, inputs], or null: then norms alone
    float* bias;    // [records, outputs] beside weight, or null
    bool with_bias;
};
void linear_grad_norms(const LinearGradients& call, int threads);

}  // namespace kr
