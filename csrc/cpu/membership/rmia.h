#pragma once
#include <cstdint>

#include "common/membership/rmia.h"

namespace kr {

// count[n] = number of z for which, by a strict majority of the queries a, x[a, n] dominates z[a, z]. One query is a
// rank, several are a vote. x: [queries, num_x], z: [queries, num_z], all >= 0, no NaN; inf / inf and 0 / 0 are no
// votes. num_z < 2^31. T: float, double.
template <class T>
void rmia(const T* x, const T* z, int64_t queries, int64_t num_x, int64_t num_z, T gamma, Predicate predicate,
          int64_t* count, int threads);

}  // namespace kr
