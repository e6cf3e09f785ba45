#pragma once
#include <cstdint>

namespace kr {

// Bootstrap replicates of a ROC that is given by its counts.
struct BootstrapAuc {
    const int64_t *inside, *outside;  // [groups] members and non-members at each distinct score from high to low
    int64_t groups;
    const int64_t* limits;  // [num_limits] ascending false-positive counts
    int64_t num_limits, replicates;
    uint64_t seed;
    double* auc;  // [replicates]
    int64_t* tp;  // [replicates, num_limits], true positives with at most limits[k] false positives
};

void bootstrap_auc(const BootstrapAuc& call, int threads);

}  // namespace kr
