#pragma once
#include <cstdint>

#include "common/distillation/distillation_loss.h"

namespace kr {
namespace cuda {

constexpr int kDistillationStats = 5;      // floats of a row that the forward pass may leave for the backward pass
constexpr int kDistillationBlocks = 4096;  // most blocks of a launch, whose sums are added up by the last one
constexpr int kDistillationWorkspace = 2 * kDistillationBlocks + 1;  // two sums a block, and how many have come

// Device memory of one call. Statistics are private to these kernels: nobody else reads them.
struct DistillationBuffers {
    float* row_loss;   // [rows] weighted losses, or null: then they are summed to *loss
    float* loss;       // or null: then no loss is requested
    float* scale;      // the factor of all gradients: 1 / sum of weights with `mean`, else 1. Backward only reads it
    float* stats;      // [rows, kDistillationStats], or null
    void* grad;        // [rows, classes] contiguous, of input's dtype, or null
    float* workspace;  // kDistillationWorkspace floats of one stream, all 0 before its first call
    const float* upstream;  // of backward: d result / d loss of row i at upstream[i * upstream_step]
    int64_t upstream_step;
    bool unless_one;  // backward does nothing where *upstream is 1: the gradient is there already
};

// Loss, scale and statistics in one launch; with `grad` also the gradient, from the same reading of the logits (one
// launch more, over the weights alone, where `mean` needs their sum first). Each returns a cudaError_t.
int distillation_loss_forward(const DistillationLoss& call, const DistillationBuffers& buffers, void* cuda_stream);

// The gradient with every factor folded in before it is rounded, in one launch; from the statistics if there are any.
int distillation_loss_backward(const DistillationLoss& call, const DistillationBuffers& buffers, void* cuda_stream);

// How many blocks, a cluster, hold a row of such a call on the current device; 0 where it is no cluster that does.
int distillation_loss_cluster(const DistillationLoss& call);

// Whether clusters may be used, from now on; for tests and measurements.
void distillation_loss_use_clusters(bool use);

}  // namespace cuda
}  // namespace kr
