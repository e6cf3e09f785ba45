#pragma once
#include <cstdint>

namespace kr {
namespace cuda {

// As kr::solver_step of csrc/cpu, on a CUDA stream. Returns a cudaError_t. `row` is host memory.
int solver_step(const float* x, const float* cond, const float* uncond, const int64_t* ids,
                const float* const* history, int terms, const float* row, float guidance, uint64_t seed,
                uint32_t stream_id, int64_t batch, int64_t numel, float* y, void* cuda_stream);

}  // namespace cuda
}  // namespace kr
