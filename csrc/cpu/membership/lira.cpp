// LiRA for all targets at once: O(M) per (query, example) for all M targets instead of the reference's O(M^2).
#include "cpu/membership/lira.h"

#include <algorithm>
#include <vector>

#include "cpu/simd/parallel.h"

namespace kr {
namespace {

constexpr int64_t kBlock = 128;  // examples; fixed, so that pooled sums do not depend on the number of threads

struct Values {
    std::vector<float> of;

    // Reorders the values: the three order statistics that medians need, by one selection.
    LiraSide side() {
        LiraSide out = {(int64_t)of.size(), 0, 0, 0, 0, 0};
        if (of.empty()) return out;
        const auto middle = of.begin() + out.count / 2;
        std::nth_element(of.begin(), middle, of.end());
        out.middle = *middle;
        if (middle != of.begin()) out.low = *std::max_element(of.begin(), middle);
        if (middle + 1 != of.end()) out.high = *std::min_element(middle + 1, of.end());
        for (float value : of) {
            const double d = value - out.middle;
            out.sum += d, out.square += d * d;
        }
        return out;
    }
};

// Pooled over examples and queries, for one target and side.
struct Pool {
    double residual = 0, count = 0, sum = 0, square = 0;

    void add(const LiraStats& side, bool raw) {
        const double n = (double)side.count;
        residual += side.residual, count += n;
        if (raw) sum += n * side.mean, square += n * (side.variance + side.mean * side.mean);
    }
    void add(const Pool& other) {
        residual += other.residual, count += other.count, sum += other.sum, square += other.square;
    }
    double within() const { return residual / std::max(1.0, count); }
    double raw() const {
        const double n = std::max(1.0, count), mean = sum / n;
        return std::max(0.0, square / n - mean * mean);
    }
};

}  // namespace

int64_t lira(const Lira& call, int threads) {
    const int64_t queries = call.queries, examples = call.examples, models = call.models, targets = call.targets;
    const Variance variance = call.variance;
    const int64_t blocks = (examples + kBlock - 1) / kBlock;
    const bool outside = call.target != nullptr, raw = variance == Variance::fixed_raw;
    // visit(example, target, value, in, out) for all of a block of examples.
    auto visit_block = [&](int64_t block, auto visit) {
        Values in, out;
        std::vector<uint8_t> held((size_t)models);
        for (int64_t n = block * kBlock; n < std::min(examples, (block + 1) * kBlock); ++n) {
            for (int64_t m = 0; m < models; ++m) held[m] = call.keep[m * examples + n];
            for (int64_t a = 0; a < queries; ++a) {
                const float* row = call.phi + (a * examples + n) * models;
                in.of.clear(), out.of.clear();
                for (int64_t m = 0; m < models; ++m) (held[m] ? in : out).of.push_back(row[m]);
                const LiraSide side_in = in.side(), side_out = out.side();
                const LiraStats all_in = lira_all(side_in), all_out = lira_all(side_out);
                for (int64_t k = 0; k < targets; ++k) {
                    if (outside)
                        visit(n, k, call.target[(a * examples + n) * targets + k], all_in, all_out);
                    else if (held[k])
                        visit(n, k, row[k], lira_without(side_in, row[k], [&](int64_t i) { return in.of[i]; }),
                              all_out);
                    else
                        visit(n, k, row[k], all_in,
                              lira_without(side_out, row[k], [&](int64_t i) { return out.of[i]; }));
                }
            }
        }
    };

    // [target][side]: variances pooled over the shadows that this target is scored against.
    std::vector<double> pooled((size_t)(2 * targets), 1.0);
    if (variance != Variance::per_example) {
        std::vector<Pool> pools(static_cast<size_t>(blocks * targets * 2));
        parallel_for(blocks, 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                Pool* to = pools.data() + block * targets * 2;
                visit_block(block, [&](int64_t, int64_t k, float, const LiraStats& in, const LiraStats& out) {
                    to[2 * k].add(in, raw), to[2 * k + 1].add(out, raw);
                });
            }
        });
        for (int64_t k = 0; k < 2 * targets; ++k) {
            Pool total;
            for (int64_t block = 0; block < blocks; ++block) total.add(pools[block * targets * 2 + k]);
            pooled[k] = raw ? total.raw() : total.within();
        }
    }

    std::vector<int64_t> num_unscored(static_cast<size_t>(blocks));
    std::vector<double> constant((size_t)models + 1);
    lira_constants(models, constant.data());
    const LiraRule rule = {call.online, variance, constant.data()};
    parallel_for(blocks, 1, threads, [&](int64_t first, int64_t last) {
        std::vector<double> sums((size_t)(kBlock * targets));  // by example: neighbours are written one after the other
        for (int64_t block = first; block < last; ++block) {
            const int64_t from = block * kBlock, width = std::min(kBlock, examples - from);
            std::fill(sums.begin(), sums.end(), 0.0);
            visit_block(block, [&](int64_t n, int64_t k, float x, const LiraStats& in, const LiraStats& out) {
                if (rule.lacks(in, out))
                    ++num_unscored[block];
                else
                    sums[(n - from) * targets + k] += rule.score(x, in, out, pooled[2 * k], pooled[2 * k + 1]);
            });
            for (int64_t k = 0; k < targets; ++k)
                for (int64_t n = 0; n < width; ++n)
                    call.scores[k * examples + from + n] = sums[n * targets + k] / (double)queries;
        }
    });
    int64_t total = 0;
    for (int64_t count : num_unscored) total += count;
    return total / (queries > 0 ? queries : 1);
}

}  // namespace kr
