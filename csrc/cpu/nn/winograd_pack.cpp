#include "cpu/simd/parallel.h"
#include "cpu/nn/winograd_conv2d.h"

#define KR_KERNEL "cpu/nn/kernels/winograd_pack_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

void winograd_pack(const WinogradPack& call, int threads) {
    const int64_t size = winograd_block(call.outputs);
    parallel_for((call.outputs + size - 1) / size, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            if (size == 16)
                KR_DISPATCH(winograd_pack_block<16>, call, block);
            else
                KR_DISPATCH(winograd_pack_block<32>, call, block);
        }
    });
}

}  // namespace kr
