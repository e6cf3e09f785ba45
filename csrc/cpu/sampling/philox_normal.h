#pragma once
#include <cstdint>

namespace kr {

// out[i, 0..numel) = the standard normals of image ids[i] in `stream`. Contiguous rows.
void philox_normal(const int64_t* ids, int64_t count, int64_t numel, uint64_t seed, uint32_t stream, float* out,
                   int threads);

}  // namespace kr
