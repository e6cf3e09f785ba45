#pragma once
#include "common/membership/membership_signals.h"

namespace kr {
namespace cuda {

// As kr::membership_signals of csrc/cpu, for logits of any Dtype, on a CUDA stream. Returns a cudaError_t.
int membership_signals(const MembershipSignals& call, void* cuda_stream);

}  // namespace cuda
}  // namespace kr
