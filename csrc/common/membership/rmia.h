#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

enum class Predicate : int { ratio, ratio_strict, reciprocal };  // the numbers that Python passes

// Does x dominate z? Each operation is rounded in T, so every predicate holds for a prefix of ascending z >= 0, and
// what it says of 0 / 0 and inf / inf is no.
template <class T>
KR_HOST_DEVICE bool dominates(T x, T z, T gamma, Predicate predicate) {
    if (predicate == Predicate::ratio) return x / z >= gamma;
    if (predicate == Predicate::ratio_strict) return x / z > gamma;
    return x * (T(1) / z) > gamma;
}

}  // namespace kr
