#include "cpu/privacy/group_norm_grad_norms.h"

#include <cmath>
#include <memory>
#include <vector>

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/privacy/group_norm_grad_norms_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

static constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

void group_norm_grad_norms(const GroupNormGradNorms& call, int threads) {
    const int64_t size = call.channels / call.groups, room = call.channels + 64;
    // Fewer records than threads: a record is cut into runs of whole groups.
    int64_t parts = call.records > 0 && call.records < threads ? (threads + call.records - 1) / call.records : 1;
    if (parts > call.groups) parts = call.groups;
    const std::unique_ptr<double[]> squares(new double[call.records * call.groups]);
    const int64_t elements = call.rows * call.pixels * call.channels / parts + 1;
    parallel_for(call.records * parts, kGrain / elements + 1, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(4 * room);
        std::vector<double> gradients(2 * call.channels);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t record = item / parts, part = item % parts;
            const int64_t first = call.groups * part / parts * size, last = call.groups * (part + 1) / parts * size;
            KR_DISPATCH(group_norm_record, call, record, first, last, scratch.data(), room, gradients.data(),
                        squares.get() + record * call.groups);
        }
    });
    for (int64_t record = 0; call.norms && record < call.records; ++record) {
        double sum = 0.0;
        for (int64_t g = 0; g < call.groups; ++g) sum += squares[record * call.groups + g];
        call.norms[record] = (float)std::sqrt(sum);
    }
}

}  // namespace kr
