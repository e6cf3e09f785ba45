#pragma once
#include <cstdint>

#include "common/membership/rmia.h"

namespace kr {
namespace cuda {

// below[a, n] = how many of z[a, :] are dominated by x[a, n]. A cudaError_t.
int rmia_below(const Rmia& call, int32_t* below, void* cuda_stream);

// count[n] += for how many z a strict majority of the queries has rank[a, z] < below[a, n]; rank: [queries, num_z].
int rmia_vote(const Rmia& call, const int32_t* below, const int32_t* rank, unsigned long long* count,
              void* cuda_stream);

}  // namespace cuda
}  // namespace kr
