#include "cpu/privacy/linear_grad_norms.h"

#include <cmath>

#include "cpu/privacy/conv2d_grad_norms.h"
#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/privacy/linear_grad_norms_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

void linear_grad_norms(const LinearGradients& call, int threads) {
    if (!call.weight && call.positions == 1) {  // |dw| = |x| |dy|
        parallel_for(call.records, 16, threads, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) {
                const double x = KR_DISPATCH(squares, call.x + b * call.inputs, call.inputs) + (call.with_bias ? 1 : 0);
                const double grad = KR_DISPATCH(squares, call.grad_output + b * call.outputs, call.outputs);
                call.norms[b] = (float)std::sqrt(x * grad);
            }
        });
        return;
    }
    ConvGradients line = {};  // a 1x1 convolution of a line of pixels
    line.x = call.x, line.grad_output = call.grad_output, line.records = call.records;
    line.width = line.output_width = call.positions, line.inputs = call.inputs, line.outputs = call.outputs;
    line.images = line.height = line.output_height = line.kernel_height = line.kernel_width = line.stride_y =
        line.stride_x = line.dilation_y = line.dilation_x = line.groups = 1;
    line.norms = call.norms, line.weight = call.weight, line.bias = call.bias, line.with_bias = call.with_bias;
    conv2d_grad_norms(line, threads);
}

}  // namespace kr
