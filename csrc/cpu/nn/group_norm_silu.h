#pragma once
#include "common/nn/group_norm_silu.h"

namespace kr {

void group_norm_silu(const GroupNorm& call, int threads);

}  // namespace kr
