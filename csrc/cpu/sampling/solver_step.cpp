#include "cpu/sampling/solver_step.h"

#include <vector>

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/sampling/solver_step_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {
void solver_step(const SolverStep& call, int threads) {
    const int64_t numel = call.channels * call.pixels;
    // What interleaves channels needs the whole image; otherwise 64 KiB of each tensor an item, inside L2.
    const int64_t block = call.input || call.image ? (numel > 0 ? numel : 1) : 1 << 14;
    const int64_t blocks = (numel + block - 1) / block;
    const int64_t item_size = numel < block ? numel + 1 : block;
    auto run = [&](auto part) {
        parallel_for(call.batch * blocks, (1 << 14) / item_size + 1, threads, [&](int64_t first, int64_t last) {
            std::vector<float> scratch(call.y ? 0 : numel);  // the next sample where only bytes of it are requested
            for (int64_t item = first; item < last; ++item) {
                const int64_t image = item / blocks, begin = item % blocks * block;
                part(image, begin, begin + block < numel ? begin + block : numel, scratch.data());
            }
        });
    };
#define KR_RUN(level)                                                                            \
    return run([&](int64_t image, int64_t begin, int64_t end, float* scratch) {                  \
        level::solver_image(call, image, begin, end, call.y ? call.y + image * numel : scratch); \
    });
#if KR_X86
    if (isa() == Isa::avx512) KR_RUN(avx512)
    if (isa() == Isa::avx2) KR_RUN(avx2)
#endif
    KR_RUN(scalar)
#undef KR_RUN
}

}  // namespace kr
