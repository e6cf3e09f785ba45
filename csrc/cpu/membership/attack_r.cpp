// Attack-R for all targets: the models that did not hold an example are sorted once, each target is one binary search.
// O(M log M) per (query, example) for all M targets, where counting for each of them is O(M^2).
#include "cpu/membership/attack_r.h"

#include <algorithm>
#include <vector>

#include "cpu/simd/parallel.h"

namespace kr {
namespace {

constexpr int64_t kBlock = 128;  // examples whose shares are written together

template <class T>
void attack_r_of(const AttackR& call, int threads) {
    const auto* phi = static_cast<const T*>(call.phi);
    const auto* target = static_cast<const T*>(call.target);
    const int64_t queries = call.queries, examples = call.examples, models = call.models, targets = call.targets;
    const int64_t blocks = (examples + kBlock - 1) / kBlock;
    parallel_for(blocks, 1, threads, [&](int64_t first, int64_t last) {
        std::vector<double> sums((size_t)(kBlock * targets));  // by example: neighbours are written one after the other
        std::vector<T> out;
        std::vector<uint8_t> held((size_t)models);
        for (int64_t block = first; block < last; ++block) {
            const int64_t from = block * kBlock, width = std::min(kBlock, examples - from);
            std::fill(sums.begin(), sums.end(), 0.0);
            for (int64_t i = 0; i < width; ++i) {
                const int64_t n = from + i;
                for (int64_t m = 0; m < models; ++m) held[m] = call.keep[m * examples + n];
                for (int64_t a = 0; a < queries; ++a) {
                    const T* row = phi + (a * examples + n) * models;
                    const T* seen = target ? target + (a * examples + n) * targets : row;
                    out.clear();
                    for (int64_t m = 0; m < models; ++m)
                        if (!held[m]) out.push_back(row[m]);
                    std::sort(out.begin(), out.end());
                    for (int64_t k = 0; k < targets; ++k) {
                        const int64_t own = !target && !held[k];  // it is among its own shadows, and at most itself
                        const int64_t below = std::upper_bound(out.begin(), out.end(), seen[k]) - out.begin() - own;
                        const int64_t count = std::max<int64_t>((int64_t)out.size() - own, 1);
                        sums[i * targets + k] += (float)below / (float)count;
                    }
                }
            }
            for (int64_t k = 0; k < targets; ++k)
                for (int64_t i = 0; i < width; ++i)
                    call.share[k * examples + from + i] = sums[i * targets + k] / queries;
        }
    });
}

}  // namespace

void attack_r(const AttackR& call, int threads) {
    call.float64 ? attack_r_of<double>(call, threads) : attack_r_of<float>(call, threads);
}

}  // namespace kr
