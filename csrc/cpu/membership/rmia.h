#pragma once
#include <cstdint>

#include "common/membership/rmia.h"

namespace kr {

// count[n] = number of z for which, by a strict majority of the queries a, x[a, n] dominates z[a, z]. One query is a
// rank, several are a vote. inf / inf and 0 / 0 are no votes.
void rmia(const Rmia& call, int64_t* count, int threads);

}  // namespace kr
