#pragma once
#include "common/nn/group_norm_silu.h"

namespace kr {
namespace cuda {

// On a CUDA stream. Returns a cudaError_t.
int group_norm_silu(const GroupNorm& call, void* cuda_stream);

}  // namespace cuda
}  // namespace kr
