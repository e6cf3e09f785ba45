#pragma once
#include <cstdint>

namespace kr {
namespace cuda {

// As kr::philox_normal of csrc/cpu, on a CUDA stream. Returns a cudaError_t.
int philox_normal(const int64_t* ids, int64_t count, int64_t numel, uint64_t seed, uint32_t stream_id, float* out,
                  void* cuda_stream);

}  // namespace cuda
}  // namespace kr
