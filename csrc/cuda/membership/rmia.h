#pragma once
#include <cstdint>

#include "common/membership/rmia.h"

namespace kr {
namespace cuda {

// below[a, n] = how many of ordered[a, :] (ascending) are dominated by x[a, n]. T: float, double. A cudaError_t.
template <class T>
int rmia_below(const T* x, const T* ordered, int64_t queries, int64_t num_x, int64_t num_z, T gamma,
               Predicate predicate, int32_t* below, void* cuda_stream);

// count[n] += for how many z a strict majority of the queries has rank[a, z] < below[a, n].
int rmia_vote(const int32_t* below, const int32_t* rank, int64_t queries, int64_t num_x, int64_t num_z,
              unsigned long long* count, void* cuda_stream);

}  // namespace cuda
}  // namespace kr
