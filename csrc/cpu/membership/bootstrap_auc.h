#pragma once
#include <cstdint>

namespace kr {

// Bootstrap replicates of a ROC that is given by its counts. inside, outside: [groups] members and non-members at each
// distinct score from high to low; limits: [num_limits] ascending false-positive counts.
// auc: [replicates]; tp: [replicates, num_limits], the members found with at most limits[k] false positives.
void bootstrap_auc(const int64_t* inside, const int64_t* outside, int64_t groups, const int64_t* limits,
                   int64_t num_limits, int64_t replicates, uint64_t seed, double* auc, int64_t* tp, int threads);

}  // namespace kr
