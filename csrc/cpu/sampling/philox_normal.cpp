#include "cpu/sampling/philox_normal.h"

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/sampling/philox_normal_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

void philox_normal(const int64_t* ids, int64_t count, int64_t numel, uint64_t seed, uint32_t stream, float* out,
                   int threads) {
    // One image may be larger than all others of a batch together, so work is cut in blocks of an image.
    const int64_t block = 1 << 14;
    const int64_t blocks = (numel + block - 1) / block;
    parallel_for(
        count * blocks, (1 << 13) / (numel < block ? numel + 1 : block) + 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t item = first; item < last; ++item) {
                const int64_t image = item / blocks, begin = item % blocks * block;
                const int64_t end = begin + block < numel ? begin + block : numel;
                KR_DISPATCH(normals_of_image, (uint64_t)ids[image], seed, stream, begin, end, out + image * numel);
            }
        });
}

}  // namespace kr
