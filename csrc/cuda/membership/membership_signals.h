#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/membership/membership_signals.h"

namespace kr {
namespace cuda {

// As kr::membership_signals of csrc/cpu, for logits of any Dtype, on a CUDA stream. Returns a cudaError_t.
int membership_signals(const void* logits, Dtype dtype, int64_t rows, int64_t classes, int64_t stride,
                       const int64_t* labels, const SignalOutputs& out, void* cuda_stream);

}  // namespace cuda
}  // namespace kr
