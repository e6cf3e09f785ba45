#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {
namespace cuda {

// As kr::pack_uint8 of csrc/cpu, from any dtype, on a CUDA stream. Returns a cudaError_t.
int pack_uint8(const void* x, Dtype dtype, int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
               uint8_t* out, void* cuda_stream);

}  // namespace cuda
}  // namespace kr
