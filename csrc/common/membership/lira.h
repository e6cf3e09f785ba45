// LiRA's arithmetic for one (query, example), shared by host and device. Carlini et al., "Membership Inference Attacks
// From First Principles", S&P 2022; what each variance is stands in kr_fast/membership/attacks/scores.py.
//
// Leaving one value out moves a median by at most one rank, so the three order statistics in the middle serve every
// target, and sums are brought up to date in O(1).
#pragma once
#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace kr {

enum class Variance : int { per_example, fixed, fixed_raw, shrinkage };  // the numbers that Python passes

// One call for all targets.
struct Lira {
    const float* phi;     // [queries, examples, models]
    const uint8_t* keep;  // 1 = in; [models, examples], on a GPU [examples, models]
    const float* target;  // [queries, examples, targets] of models outside phi, or null: then every model of phi is a
                          // target, scored against the others (leave one out)
    int64_t queries, examples, models, targets;
    bool online;
    Variance variance;
    double* scores;  // [targets, examples], higher for members; 0 (no evidence) where a side has too few shadows
};

// The shadows' values on one side (in or out). `low`, `middle`, `high`: the values of rank count / 2 - 1, count / 2 and
// count / 2 + 1, the last for odd counts only. The sums are of (value - middle) and of its square.
struct LiraSide {
    int64_t count;
    double low, middle, high, sum, square;
};

struct LiraStats {
    int64_t count;
    double median, mean, variance, residual;  // residual: sum of squared distances from the median
};

KR_HOST_DEVICE LiraStats lira_stats(int64_t count, double median, double shift, double sum, double square) {
    const double mean = sum / (double)count, centre = median - shift;
    return {count, median, mean + shift, (square - (double)count * mean * mean) / (double)count,
            square - 2 * centre * sum + (double)count * centre * centre};
}

// Statistics of all values of a side.
KR_HOST_DEVICE LiraStats lira_all(const LiraSide& side) {
    if (side.count == 0) return {0, 0, 0, 0, 0};
    const double median = side.count % 2 ? side.middle : 0.5 * (side.low + side.middle);
    const LiraStats out = lira_stats(side.count, median, side.middle, side.sum, side.square);
    return {out.count, out.median, out.mean, out.variance > 0 ? out.variance : 0, out.residual};
}

// Statistics of a side without one of its values, x. values(i), i < side.count: its values, in any order.
template <class Values>
KR_HOST_DEVICE LiraStats lira_without(const LiraSide& side, double x, Values values) {
    const int64_t count = side.count - 1;
    if (count <= 0) return {0, 0, 0, 0, 0};
    double median;
    if (count % 2)
        median = x <= side.low ? side.middle : side.low;
    else
        median = 0.5 * ((x < side.middle ? side.middle : side.low) + (x > side.middle ? side.middle : side.high));
    const double d = x - side.middle, square = side.square - d * d;
    const LiraStats out = lira_stats(count, median, side.middle, side.sum - d, square);
    constexpr double kCancelled = 1e-8;  // share of the sum of squares below which its digits are lost
    if (out.variance * (double)count >= kCancelled * side.square) return out;
    // An outlier was left out and little remains of the difference: sum anew.
    const double mean = out.mean;
    double variance = 0, residual = 0;
    bool left_out = false;
    for (int64_t i = 0; i < side.count; ++i) {
        const double value = values(i);
        if (!left_out && value == x) {
            left_out = true;
            continue;
        }
        variance += (value - mean) * (value - mean), residual += (value - median) * (value - median);
    }
    return {count, median, mean, variance / (double)count, residual};
}

// How targets are scored. The tables, by number of shadows, serve "shrinkage": Student-t with the variance's posterior,
// in which the pooled variance counts as kLiraPrior shadows beside the example's own.
constexpr double kLiraPrior = 8;
struct LiraRule {
    bool online;
    Variance variance;
    const double* constant;  // ln of the density's constant factor

    KR_HOST_DEVICE int64_t least() const { return variance == Variance::per_example ? 2 : 1; }
    KR_HOST_DEVICE bool lacks(const LiraStats& in, const LiraStats& out) const {
        return out.count < least() || (online && in.count < least());
    }

    // The reference adds 1e-30, so that equal shadows do not divide by zero.
    KR_HOST_DEVICE double deviation(const LiraStats& side, double pooled) const {
        if (variance == Variance::per_example) return ::sqrt(side.variance) + 1e-30;
        if (variance != Variance::shrinkage) return ::sqrt(pooled) + 1e-30;
        const double n = (double)side.count;
        return ::sqrt((kLiraPrior * pooled + side.residual) * (n + 1) / ((kLiraPrior + n) * n)) + 1e-30;
    }

    // ln of the Student-t density at z = (x - median) / scale, times scale.
    KR_HOST_DEVICE double log_student(double z, int64_t count) const {
        const double freedom = kLiraPrior + (double)count;
        return constant[count] - 0.5 * (freedom + 1) * ::log1p(z * z / freedom);
    }

    // Of a pair that does not lack shadows. pooled: variances over all examples, of the side in and of the side out.
    KR_HOST_DEVICE double score(double x, const LiraStats& in, const LiraStats& out, double pooled_in,
                                double pooled_out) const {
        const double wide_out = deviation(out, pooled_out), z_out = (x - out.median) / wide_out;
        if (!online) return z_out;
        const double wide_in = deviation(in, pooled_in), z_in = (x - in.median) / wide_in;
        const double widths = ::log(wide_out / wide_in);
        if (variance == Variance::shrinkage)
            return widths + log_student(z_in, in.count) - log_student(z_out, out.count);
        return widths + 0.5 * (z_out * z_out - z_in * z_in);
    }
};

// constant[n] of LiraRule for n = 0 .. models.
inline void lira_constants(int64_t models, double* constant) {
    for (int64_t n = 0; n <= models; ++n) {
        const double freedom = kLiraPrior + (double)n;
        constant[n] = std::lgamma((freedom + 1) / 2) - std::lgamma(freedom / 2) - 0.5 * std::log(freedom);
    }
}

}  // namespace kr
