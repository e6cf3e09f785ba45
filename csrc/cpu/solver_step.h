#pragma once
#include <cstdint>

namespace kr {

// y = the next sample (see csrc/common/solver_row.h). All tensors are contiguous [batch, numel]; uncond and ids may be
// null; history holds `terms` addresses. row: x0_sample, x0_model, clip, sample, model, x0, noise, next_input, history.
void solver_step(const float* x, const float* cond, const float* uncond, const int64_t* ids,
                 const float* const* history, int terms, const float* row, float guidance, uint64_t seed,
                 uint32_t stream, int64_t batch, int64_t numel, float* y, int threads);

}  // namespace kr
