#include "cpu/solver_step.h"

#include "cpu/parallel.h"

#define KR_KERNEL "cpu/solver_step_kernel.h"
#include "cpu/foreach_isa.h"

namespace kr {
namespace {

template <class Row>
Row fill(const float* row, int terms, float guidance) {
    Row out = {row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], {0, 0, 0, 0}, guidance, terms};
    for (int k = 0; k < terms; ++k) out.history[k] = row[8 + k];
    return out;
}

}  // namespace

void solver_step(const float* x, const float* cond, const float* uncond, const int64_t* ids,
                 const float* const* history, int terms, const float* row, float guidance, uint64_t seed,
                 uint32_t stream, int64_t batch, int64_t numel, float* y, int threads) {
    const int64_t block = 1 << 14;  // elements a work item: 64 KiB of each tensor, inside L2
    const int64_t blocks = (numel + block - 1) / block;
    const int64_t item_size = numel < block ? numel + 1 : block;
    auto run = [&](auto image_of) {
        parallel_for(batch * blocks, (1 << 14) / item_size + 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t item = first; item < last; ++item) {
                const int64_t image = item / blocks, begin = item % blocks * block;
                image_of(image, begin, begin + block < numel ? begin + block : numel);
            }
        });
    };
#define KR_RUN(level)                                                                                             \
    {                                                                                                             \
        const auto filled = fill<level::SolverRow>(row, terms, guidance);                                         \
        run([&](int64_t image, int64_t begin, int64_t end) {                                                      \
            const int64_t offset = image * numel;                                                                 \
            level::SolverImage at = {x + offset, cond + offset, uncond ? uncond + offset : nullptr, {}, y + offset}; \
            for (int k = 0; k < terms; ++k) at.history[k] = history[k] + offset;                                  \
            level::solver_image(at, ids ? (uint64_t)ids[image] : 0, filled, seed, stream, begin, end);            \
        });                                                                                                       \
        return;                                                                                                   \
    }
#if KR_X86
    if (isa() == Isa::avx512) KR_RUN(avx512)
    if (isa() == Isa::avx2) KR_RUN(avx2)
#endif
    KR_RUN(scalar)
#undef KR_RUN
}

}  // namespace kr
