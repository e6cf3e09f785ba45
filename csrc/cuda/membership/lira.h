#pragma once
#include <cstdint>

#include "common/membership/lira.h"

namespace kr {
namespace cuda {

constexpr int64_t kLiraModels = 1024, kLiraBlocks = 4096;

// One call for all targets. phi: [queries, examples, models]; keep: [examples, models], 1 = in. target: [queries,
// examples, targets] of models outside phi, or null: each model of phi is scored against the others.
struct LiraCall {
    const float* phi;
    const uint8_t* keep;
    const float* target;
    int64_t queries, examples, models, targets;
};

// Sums over all examples for the pooled variances of each target (of one for all where targets are from outside), by
// block of the launch: partial [lira_blocks(examples), targets, 2 sides, 2]. A side's two numbers are the sum of values
// and of their squares for fixed_raw, else the sum of squared distances from the medians and 0.
int lira_pool(const LiraCall& call, bool raw, double* partial, void* cuda_stream);
inline int64_t lira_blocks(int64_t examples) { return examples < kLiraBlocks ? examples : kLiraBlocks; }

// scores: [targets, examples], as kr::lira of csrc/cpu. pooled: variances [targets (or 1), 2 sides], null for
// per_example. lacking: the number of pairs that lack shadows is added to it.
int lira(const LiraCall& call, const LiraRule& rule, const double* pooled, double* scores, unsigned long long* lacking,
         void* cuda_stream);

}  // namespace cuda
}  // namespace kr
