#include "cpu/nn/group_norm_silu.h"

#include <vector>

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/nn/kernels/group_norm_silu_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

static constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

void group_norm_silu(const GroupNorm& call, int threads) {
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
        const int64_t room = channels + 64;  // whole vectors are written
        std::vector<float> scratch(3 * room);
        float *mean = scratch.data(), *squares = mean + room, *shift = squares + room;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t sample = item / parts, part = item % parts;
            const int64_t first = call.groups * part / parts * size, last = call.groups * (part + 1) / parts * size;
            const float* added = floats(call.shift, call.shift_dtype, sample * call.shift_stride, shift);
            KR_DISPATCH(norm_part_of, call, sample, first, last, weight, bias, added, mean, squares);
        }
    });
}

}  // namespace kr
