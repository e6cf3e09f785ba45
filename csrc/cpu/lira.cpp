// LiRA (Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022) for all targets at once.
//
// One sort per (query, example) serves every target: leaving one value out moves the median by at most one place and
// updates sums in O(1). So O(M log M) per example instead of the reference's O(M^2).
#include "cpu/lira.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"

namespace kr {
namespace {

constexpr double kCancelled = 1e-8;  // share of the sum of squares below which its digits are lost
constexpr int64_t kBlock = 128;  // examples; fixed, so that pooled sums do not depend on the number of threads

struct Side {
    std::vector<double> sorted;
    double shift = 0, sum = 0, square = 0;  // of (value - shift)

    void build() {
        std::sort(sorted.begin(), sorted.end());
        shift = sorted.empty() ? 0.0 : sorted[sorted.size() / 2];
        sum = square = 0;
        for (double value : sorted) sum += value - shift, square += (value - shift) * (value - shift);
    }
};

struct Stats {
    int64_t count;
    double median, variance, residual;  // residual: sum of squared distances from the median
};

// Statistics of a side without one of its values; `without` is null to leave none out.
Stats statistics(const Side& side, const double* without) {
    int64_t count = (int64_t)side.sorted.size(), removed = count;
    double sum = side.sum, square = side.square;
    if (without) {
        removed = std::lower_bound(side.sorted.begin(), side.sorted.end(), *without) - side.sorted.begin();
        const double d = *without - side.shift;
        sum -= d, square -= d * d, --count;
    }
    if (count == 0) return {0, 0, 0, 0};
    auto at = [&](int64_t i) { return side.sorted[i + (i >= removed)]; };
    const double median = count % 2 ? at(count / 2) : 0.5 * (at(count / 2 - 1) + at(count / 2));
    const double mean = sum / count, centre = median - side.shift;
    const double deviations = square - count * mean * mean;
    if (deviations >= kCancelled * side.square)
        return {count, median, deviations / count, square - 2 * centre * sum + count * centre * centre};
    // An outlier was left out and little remains of the difference: sum anew.
    double variance = 0, residual = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double from_mean = at(i) - side.shift - mean, from_median = at(i) - median;
        variance += from_mean * from_mean, residual += from_median * from_median;
    }
    return {count, median, variance / count, residual};
}

double log_normal(double x, double mean, double deviation) {
    const double z = (x - mean) / deviation;
    return -0.5 * z * z - std::log(deviation);  // the constant cancels in every use
}

}  // namespace

int64_t lira(const float* phi, const uint8_t* keep, const float* target, int64_t queries, int64_t examples,
             int64_t models, int64_t targets, bool online, bool fixed_variance, double* scores, int threads) {
    const int64_t blocks = (examples + kBlock - 1) / kBlock;
    const bool outside = target != nullptr;
    // visit(query, example, target, value, in, out) for all of a block of examples.
    auto visit_block = [&](int64_t block, auto visit) {
        Side in, out;
        for (int64_t n = block * kBlock; n < std::min(examples, (block + 1) * kBlock); ++n)
            for (int64_t a = 0; a < queries; ++a) {
                const float* row = phi + (a * examples + n) * models;
                in.sorted.clear(), out.sorted.clear();
                for (int64_t m = 0; m < models; ++m)
                    (keep[m * examples + n] ? in : out).sorted.push_back(row[m]);
                in.build(), out.build();
                const Stats all_in = statistics(in, nullptr), all_out = statistics(out, nullptr);
                for (int64_t k = 0; k < targets; ++k) {
                    if (outside) {
                        visit(n, k, (double)target[(a * examples + n) * targets + k], all_in, all_out);
                        continue;
                    }
                    const double value = row[k];
                    const bool member = keep[k * examples + n];
                    visit(n, k, value, member ? statistics(in, &value) : all_in,
                          member ? all_out : statistics(out, &value));
                }
            }
    };

    std::vector<double> in_deviation(targets, 1.0), out_deviation(targets, 1.0);
    if (fixed_variance) {
        // Pooled within-example variance about the median, over the shadows that this target is scored against.
        std::vector<double> sums(static_cast<size_t>(blocks * targets * 4));
        parallel_for(blocks, 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                double* to = sums.data() + block * targets * 4;
                visit_block(block, [&](int64_t, int64_t k, double, const Stats& in, const Stats& out) {
                    to[4 * k] += in.residual, to[4 * k + 1] += (double)in.count;
                    to[4 * k + 2] += out.residual, to[4 * k + 3] += (double)out.count;
                });
            }
        });
        for (int64_t k = 0; k < targets; ++k) {
            double total[4] = {0, 0, 0, 0};
            for (int64_t block = 0; block < blocks; ++block)
                for (int i = 0; i < 4; ++i) total[i] += sums[(block * targets + k) * 4 + i];
            in_deviation[k] = std::sqrt(total[0] / std::max(1.0, total[1]));
            out_deviation[k] = std::sqrt(total[2] / std::max(1.0, total[3]));
        }
    }

    std::fill(scores, scores + targets * examples, 0.0);
    std::vector<int64_t> lacking(static_cast<size_t>(blocks));
    const int64_t least = fixed_variance ? 1 : 2;
    parallel_for(blocks, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block)
            visit_block(block, [&](int64_t n, int64_t k, double value, const Stats& in, const Stats& out) {
                if (out.count < least || (online && in.count < least)) {
                    ++lacking[block];
                    return;
                }
                // The reference adds 1e-30, so that equal shadows do not divide by zero.
                const double so = (fixed_variance ? out_deviation[k] : std::sqrt(out.variance)) + 1e-30;
                double score = (value - out.median) / so;
                if (online) {
                    const double si = (fixed_variance ? in_deviation[k] : std::sqrt(in.variance)) + 1e-30;
                    score = log_normal(value, in.median, si) - log_normal(value, out.median, so);
                }
                scores[k * examples + n] += score / (double)queries;
            });
    });
    int64_t total = 0;
    for (int64_t count : lacking) total += count;
    return total / (queries > 0 ? queries : 1);
}

}  // namespace kr
