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
    double median, mean, variance, residual;  // residual: sum of squared distances from the median
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
    if (count == 0) return {0, 0, 0, 0, 0};
    auto at = [&](int64_t i) { return side.sorted[i + (i >= removed)]; };
    const double median = count % 2 ? at(count / 2) : 0.5 * (at(count / 2 - 1) + at(count / 2));
    const double mean = sum / count, centre = median - side.shift;
    const double deviations = square - count * mean * mean;
    if (deviations >= kCancelled * side.square)
        return {count, median, mean + side.shift, deviations / count, square - 2 * centre * sum + count * centre * centre};
    // An outlier was left out and little remains of the difference: sum anew.
    double variance = 0, residual = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double from_mean = at(i) - side.shift - mean, from_median = at(i) - median;
        variance += from_mean * from_mean, residual += from_median * from_median;
    }
    return {count, median, mean + side.shift, variance / count, residual};
}

double log_normal(double x, double mean, double deviation) {
    const double z = (x - mean) / deviation;
    return -0.5 * z * z - std::log(deviation);  // the constant cancels in every use
}

// Pooled over examples and queries, for one target and side.
struct Pool {
    double residual = 0, count = 0, sum = 0, square = 0;

    void add(const Stats& side) {
        const double n = (double)side.count;
        residual += side.residual, count += n, sum += n * side.mean;
        square += n * (side.variance + side.mean * side.mean);
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

// Student-t with the variance's posterior: the pooled variance counts as kPrior shadows beside the example's own.
constexpr double kPrior = 8;
struct LogStudent {
    std::vector<double> constant;  // by number of shadows

    explicit LogStudent(int64_t models) {
        for (int64_t n = 0; n <= models; ++n) {
            const double freedom = kPrior + (double)n;
            constant.push_back(std::lgamma((freedom + 1) / 2) - std::lgamma(freedom / 2) - 0.5 * std::log(freedom));
        }
    }
    static double scale(const Stats& side, double pooled) {
        const double n = (double)side.count;
        return std::sqrt((kPrior * pooled + side.residual) / (kPrior + n) * (1 + 1 / n)) + 1e-30;
    }
    double operator()(double x, const Stats& side, double scale) const {
        const double freedom = kPrior + (double)side.count, z = (x - side.median) / scale;
        return constant[(size_t)side.count] - std::log(scale) - (freedom + 1) / 2 * std::log1p(z * z / freedom);
    }
};

}  // namespace

int64_t lira(const float* phi, const uint8_t* keep, const float* target, int64_t queries, int64_t examples,
             int64_t models, int64_t targets, bool online, Variance variance, double* scores, int threads) {
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

    // [side][target]: variances pooled over the shadows that this target is scored against.
    std::vector<double> pooled[2] = {std::vector<double>(targets, 1.0), std::vector<double>(targets, 1.0)};
    if (variance != Variance::per_example) {
        std::vector<Pool> pools(static_cast<size_t>(blocks * targets * 2));
        parallel_for(blocks, 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                Pool* to = pools.data() + block * targets * 2;
                visit_block(block, [&](int64_t, int64_t k, double, const Stats& in, const Stats& out) {
                    to[2 * k].add(in), to[2 * k + 1].add(out);
                });
            }
        });
        for (int64_t k = 0; k < targets; ++k)
            for (int side = 0; side < 2; ++side) {
                Pool total;
                for (int64_t block = 0; block < blocks; ++block) total.add(pools[(block * targets + k) * 2 + side]);
                pooled[side][k] = variance == Variance::fixed_raw ? total.raw() : total.within();
            }
    }

    std::fill(scores, scores + targets * examples, 0.0);
    std::vector<int64_t> lacking(static_cast<size_t>(blocks));
    const int64_t least = variance == Variance::per_example ? 2 : 1;
    const LogStudent student(models);
    parallel_for(blocks, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block)
            visit_block(block, [&](int64_t n, int64_t k, double value, const Stats& in, const Stats& out) {
                if (out.count < least || (online && in.count < least)) {
                    ++lacking[block];
                    return;
                }
                // The reference adds 1e-30, so that equal shadows do not divide by zero.
                auto deviation = [&](const Stats& side, double pool) {
                    if (variance == Variance::shrinkage) return LogStudent::scale(side, pool);
                    return std::sqrt(variance == Variance::per_example ? side.variance : pool) + 1e-30;
                };
                const double so = deviation(out, pooled[1][k]);
                double score = (value - out.median) / so;
                if (online) {
                    const double si = deviation(in, pooled[0][k]);
                    score = variance == Variance::shrinkage
                                ? student(value, in, si) - student(value, out, so)
                                : log_normal(value, in.median, si) - log_normal(value, out.median, so);
                }
                scores[k * examples + n] += score / (double)queries;
            });
    });
    int64_t total = 0;
    for (int64_t count : lacking) total += count;
    return total / (queries > 0 ? queries : 1);
}

}  // namespace kr
