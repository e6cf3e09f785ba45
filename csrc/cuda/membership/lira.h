#pragma once
#include <cstdint>

#include "common/membership/lira.h"

namespace kr {
namespace cuda {

constexpr int64_t kLiraModels = 1024, kLiraBlocks = 4096;

struct LiraBuffers {
    const double* constant;            // of LiraRule
    const double* pooled;              // variances [targets (or 1), 2 sides], null for per_example
    unsigned long long* num_unscored;  // the number of pairs that lack shadows is added to it
};

// Sums over all examples for the pooled variances of each target (of one for all where targets are from outside), by
// block of the launch: partial [lira_blocks(examples), targets, 2 sides, 2]. A side's two numbers are the sum of values
// and of their squares for fixed_raw, else the sum of squared distances from the medians and 0.
int lira_pool(const Lira& call, double* partial, void* cuda_stream);
inline int64_t lira_blocks(int64_t examples) { return examples < kLiraBlocks ? examples : kLiraBlocks; }

int lira(const Lira& call, const LiraBuffers& buffers, void* cuda_stream);  // as kr::lira of csrc/cpu

}  // namespace cuda
}  // namespace kr
