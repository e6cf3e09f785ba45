#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

// One call of solver_step; the formula is in csrc/common/sampling/solver_row.h. Tensors are contiguous [batch,
// channels, pixels] unless said otherwise; those marked so may be null.
struct SolverStep {
    const float *x, *cond;
    const float* uncond;  // null without guidance
    const int64_t* ids;   // [batch], null without noise
    const float* limits;  // [batch] of dynamic thresholding, or null
    const float* const* history;
    int terms;         // addresses in history
    const float* row;  // x0_sample, x0_model, clip, sample, model, x0, noise, next_input, keep[3], history
    float guidance;
    uint64_t seed;
    uint32_t stream;
    int64_t batch, channels, pixels;
    float* y;     // the next sample; may be x; null if not wanted
    float* kept;  // null if not wanted
    void* input;  // next_input * y, [copies, batch, pixels, channels]; null if not wanted
    Dtype input_dtype;
    int copies;
    uint8_t* image;  // bytes of y as pack_uint8 makes them, [batch, pixels, channels]; null if not wanted
    int threads;
};

void solver_step(const SolverStep& call);

}  // namespace kr
