#pragma once
#include "common/sampling/solver_step.h"

namespace kr {
namespace cuda {

// On a CUDA stream; pointers are device memory. Returns a cudaError_t.
int solver_step(const SolverStep& call, void* cuda_stream);

}  // namespace cuda
}  // namespace kr
