#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {
namespace cuda {

// The steps of a whole trajectory in device memory, so that one captured graph serves them all. x, y, kept and history
// of the call are then slots of two rings of tensors [batch, channels, pixels].
struct SolverTable {
    const int64_t* step;  // the step to make; null if the call itself holds its row
    int64_t steps;        // beyond these nothing is done
    const float* rows;    // [steps, 16]: as SolverStep::row, then four history coefficients and their number
    const int32_t*
        slots;  // [steps, 8]: of x, of y, of kept or -1, 0, then history: a kept slot k, or -1 - a sample slot
    float* samples;
    float* kept;
};

// As kr::SolverStep of csrc/cpu. The network's outputs may be of any dtype, and channels interleaved; `stream` is that
// of step 0 where there is a table. Pointers are device memory but for `history` and `row`.
struct SolverStep {
    const float* x;
    const void *cond, *uncond;
    Dtype output_dtype;
    bool output_channels_last;
    const int64_t* ids;
    const float* limits;
    const float* const* history;
    int terms;
    const float* row;
    float guidance;
    uint64_t seed;
    uint32_t stream;
    int64_t batch, channels, pixels;
    float *y, *kept;
    void* input;
    Dtype input_dtype;
    int copies;
    uint8_t* image;
    SolverTable table;
};

// On a CUDA stream. Returns a cudaError_t.
int solver_step(const SolverStep& call, void* cuda_stream);

}  // namespace cuda
}  // namespace kr
