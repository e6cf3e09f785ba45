#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

enum class Predicate : int { ratio, ratio_strict, reciprocal };  // the numbers that Python passes

// Likelihood ratios of records x and of the population z, all >= 0, no NaN; float, or double if float64.
struct Rmia {
    const void* x;  // [queries, num_x]
    const void* z;  // [queries, num_z], ascending on a GPU
    bool float64;
    int64_t queries, num_x, num_z;  // num_z < 2^31
    double gamma;
    Predicate predicate;
};

// Does x dominate z? Each operation is rounded in T, so every predicate holds for a prefix of ascending z >= 0, and
// what it says of 0 / 0 and inf / inf is no.
template <class T>
KR_HOST_DEVICE bool dominates(T x, T z, T gamma, Predicate predicate) {
    if (predicate == Predicate::ratio) return x / z >= gamma;
    if (predicate == Predicate::ratio_strict) return x / z > gamma;
    return x * (T(1) / z) > gamma;
}

}  // namespace kr
