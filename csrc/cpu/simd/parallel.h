// A parallel loop on the OpenMP runtime that torch uses too. `threads` comes from torch.get_num_threads().
#pragma once
#include <cstdint>

namespace kr {

// Calls body(begin, end) on up to `threads` contiguous parts of [0, n), none of them shorter than `grain`.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
    int64_t parts = grain > 0 ? (n + grain - 1) / grain : n;
    if (parts > threads) parts = threads;
    if (parts <= 1) {
        if (n > 0) body(int64_t{0}, n);
        return;
    }
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) body(n * part / parts, n * (part + 1) / parts);
}

}  // namespace kr
