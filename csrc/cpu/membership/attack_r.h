#pragma once
#include <cstdint>

namespace kr {

// share[k, n] = mean over queries of the share of models that did not hold example n whose phi is at most that of
// target k. A count of no models is 0.
struct AttackR {
    const void* phi;      // [queries, examples, models], no NaN; float, or double if float64
    const uint8_t* keep;  // [models, examples], 1 = held
    const void* target;   // [queries, examples, targets] of models outside phi, or null: then every model of phi is a
                          // target, left out of the count
    bool float64;
    int64_t queries, examples, models, targets;
    double* share;  // [targets, examples]
};

void attack_r(const AttackR& call, int threads);

}  // namespace kr
