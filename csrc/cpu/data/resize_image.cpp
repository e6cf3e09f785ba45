#include "cpu/data/resize_image.h"

#include <vector>

namespace kr {
namespace {

constexpr int64_t kLines = 8;  // of the vertical pass, which are turned together: of 4 channels, a cache line

}  // namespace
}  // namespace kr

#define KR_KERNEL "cpu/data/resize_image_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

void resize_image(const ResizeImage& call) {
    const int64_t before = call.columns.from * call.channels, after = call.rows.to * call.channels;
    static thread_local std::vector<int16_t> scratch;  // memory from the system costs more than the arithmetic
    scratch.resize((size_t)(kLines * before + after + call.columns.from * after));
    KR_DISPATCH(resample, call, scratch.data());
}

}  // namespace kr
