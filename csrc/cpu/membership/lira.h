#pragma once
#include <cstdint>

#include "common/membership/lira.h"

namespace kr {

// Likelihood-ratio scores. Returns how many (target, example) pairs had too few shadows on a side.
int64_t lira(const Lira& call, int threads);

}  // namespace kr
