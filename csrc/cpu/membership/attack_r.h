#pragma once
#include <cstdint>

namespace kr {

// share[k, n] = mean over queries of the share of models that did not hold example n whose phi is at most that of
// target k. phi: [queries, examples, models], no NaN; keep: [models, examples] (1 = held). target: [queries, examples,
// targets] of models outside phi, or null: then every model of phi is a target, left out of the count. A count of no
// models is 0. share: [targets, examples]. T: float, double.
template <class T>
void attack_r(const T* phi, const uint8_t* keep, const T* target, int64_t queries, int64_t examples, int64_t models,
              int64_t targets, double* share, int threads);

}  // namespace kr
