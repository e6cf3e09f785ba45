#include "cpu/nn/group_norm_silu.h"

#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/simd/parallel.h"

namespace kr {

enum class NormEnd { none, silu, relu, sum_relu };  // what follows the norm

}  // namespace kr

#define KR_KERNEL "cpu/nn/kernels/group_norm_silu_backward_kernel.h"  // and that of the forward pass
#include "cpu/simd/foreach_isa.h"

namespace kr {

static constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

// body(sample, first channel, last, weight, bias, shift, scratch) for all groups of all samples, where scratch holds
// `arrays` arrays of `room` floats for whole vectors over the channels.
template <class Body>
static void each_part(const GroupNorm& call, int threads, int64_t arrays, int64_t room, const Body& body) {
    const int64_t channels = call.x_channels + call.skip_channels, size = channels / call.groups;
    std::vector<float> affine(2 * channels);
    auto floats = [=](const void* from, Dtype dtype, int64_t offset, float* scratch) {
        return from ? KR_DISPATCH(norm_floats, from, dtype, offset, channels, scratch) : nullptr;
    };
    const float* weight = floats(call.weight, call.affine_dtype, 0, affine.data());
    const float* bias = floats(call.bias, call.affine_dtype, 0, affine.data() + channels);
    // Fewer samples than threads: a sample is cut into runs of whole groups.
    int64_t parts = call.batch > 0 && call.batch < threads ? (threads + call.batch - 1) / call.batch : 1;
    if (parts > call.groups) parts = call.groups;
    const int64_t elements = call.pixels * channels / parts + 1;
    parallel_for(call.batch * parts, kGrain / elements + 1, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch((arrays + 1) * room);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t sample = item / parts, part = item % parts;
            const int64_t first = call.groups * part / parts * size, last = call.groups * (part + 1) / parts * size;
            float* room_for_shift = scratch.data() + arrays * room;
            const float* shift = floats(call.shift, call.shift_dtype, sample * call.shift_stride, room_for_shift);
            body(sample, first, last, weight, bias, shift, scratch.data());
        }
    });
}

static void forward(const GroupNorm& call, const GroupNormRelu* relu, const GroupNormStatistics& out, int threads) {
    const int64_t room = call.x_channels + call.skip_channels + 64;
    each_part(call, threads, 2, room,
              [&](int64_t sample, int64_t first, int64_t last, const float* weight, const float* bias,
                  const float* shift, float* scratch) {
                  KR_DISPATCH(norm_part_of, call, sample, first, last, weight, bias, shift, scratch, scratch + room,
                              out, relu);
              });
}

void group_norm_silu(const GroupNorm& call, const GroupNormStatistics& out, int threads) {
    forward(call, nullptr, out, threads);
}

void group_norm_relu(const GroupNorm& call, const GroupNormRelu& relu, const GroupNormStatistics& out, int threads) {
    forward(call, &relu, out, threads);
}

void group_norm_silu_backward(const GroupNorm& call, const GroupNormGradient& grads, int threads) {
    const int64_t channels = call.x_channels + call.skip_channels, room = channels + 64;
    const std::unique_ptr<float[]> own(grads.samples ? nullptr : new float[2 * channels * call.batch]);
    float* const partial = grads.samples ? grads.samples : own.get();
    each_part(call, threads, 8, room,
              [&](int64_t sample, int64_t first, int64_t last, const float* weight, const float* bias,
                  const float* shift, float* scratch) {
                  KR_DISPATCH(norm_gradient_of, call, grads, sample, first, last, weight, bias, shift, scratch, room,
                              partial + 2 * channels * sample);
              });
    if (grads.samples) return;
    const std::unique_ptr<double[]> sums(new double[2 * channels]);
    KR_DISPATCH(sum_rows, partial, call.batch, 2 * channels, sums.get());
    for (int64_t c = 0; c < channels; ++c) {
        grads.grad_weight[c] = (float)sums[c];
        grads.grad_bias[c] = (float)sums[channels + c];
    }
}

}  // namespace kr
