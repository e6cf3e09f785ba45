// One call of solver_step, on the host and on the device. The formula is in solver_row.h.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

constexpr int kSolverHistory = 4;  // most history terms
constexpr int kSolverNumbers = 11, kSolverTableRow = 16, kSolverTableSlots = 8;

struct SolverRow {
    float x0_sample, x0_model, clip, sample, model, x0, noise, next_input;
    float keep[3];  // of sample, model and clean image
    float history[kSolverHistory];
    float guidance;
    int terms;  // history terms in use
};

// The numbers of a row in Python's order: the fields of SolverRow, as many history coefficients as there are terms.
KR_HOST_DEVICE SolverRow solver_row(const float* from, int terms, float guidance) {
    SolverRow row = {
        from[0],      from[1],  from[2], from[3], from[4], from[5], from[6], from[7], {from[8], from[9], from[10]},
        {0, 0, 0, 0}, guidance, terms};
    for (int k = 0; k < kSolverHistory; ++k)
        if (k < terms) row.history[k] = from[kSolverNumbers + k];
    return row;
}

// The steps of a whole trajectory in device memory, so that one captured graph serves them all. x, y, kept and history
// of the call are then slots of two rings of tensors [batch, channels, pixels].
struct SolverTable {
    const int64_t* step;  // the step to make; null if the call itself holds its row
    int64_t steps;        // beyond these nothing is done
    const float* rows;    // [steps, 16]: a row's numbers, four history coefficients, their number
    const int32_t*
        slots;  // [steps, 8]: of x, of y, of kept or -1, 0, then history: a kept slot k, or -1 - a sample slot
    float* samples;
    float* kept;
};

// Tensors are contiguous [batch, channels, pixels] unless said otherwise. On the host the network's outputs are float32
// and contiguous, and there is no table.
struct SolverStep {
    const float* x;
    const void *cond, *uncond;  // uncond is null without guidance
    Dtype output_dtype;         // of both
    bool output_channels_last;
    const int64_t* ids;   // [batch], null without noise
    const float* limits;  // [batch] of dynamic thresholding, or null
    const float* history[kSolverHistory];
    SolverRow row;
    uint64_t seed;
    uint32_t stream;  // where there is a table that of step 0
    int64_t batch, channels, pixels;
    float *y, *kept;  // the next sample, which may be x, and what a later step reads; null if not requested
    void* input;      // next_input * y, [copies, batch, pixels, channels]; null if not requested
    Dtype input_dtype;
    int copies;
    uint8_t* image;  // bytes of y as pack_uint8 makes them, [batch, pixels, channels]; null if not requested
    SolverTable table;
};

}  // namespace kr
