#pragma once
#include <cstdint>
#include <memory>

#include "common/dtype.h"

namespace kr {

// y = act(weight (x - mean) / sqrt(var + eps) + bias + residual), act = ReLU or nothing, over `rows` of adjacent
// channels; mean and biased variance of each channel over the rows. x, residual and y are of type `dtype`.
struct BatchNormAct {
    const void *x, *residual;  // residual may be null
    int64_t rows, channels;
    Dtype dtype;
    const float *weight, *bias;  // [channels] or null for 1 and 0
    float eps;
    bool relu;
    void* y;
    float *mean, *var;  // [channels]
    uint8_t* positive;  // null, or a bit of each number: whether it passed the ReLU, behind a residual. See below
};

// Its gradients. Where a ReLU stands behind and y is null, y > 0 is taken from x again, which is right if there was no
// residual. passed receives the gradient behind the ReLU and is null where nobody asks for it; it needs y.
struct BatchNormActGradient {
    const void *grad, *x, *y;
    int64_t rows, channels;
    Dtype dtype;
    const float *weight, *bias, *mean, *var;
    float eps;
    bool relu;
    void *out, *passed;
    float *grad_weight, *grad_bias;  // [channels]
    const uint8_t* positive;         // null, or in the place of y
};

void batch_norm_act(const BatchNormAct& call, int threads);
void batch_norm_act_backward(const BatchNormActGradient& call, int threads);

struct NormLines;
struct NormGroups;

// The same in steps, for a caller that goes through groups of rows while they are in the cache: float32, a multiple of
// 16 channels. A call is that of one group, on one thread; every group but the last has `rows` rows. Partial sums of
// all groups are merged in their order, and the bits of `positive` are 0 before they are written.
class NormSteps {
  public:
    NormSteps(int64_t rows, int64_t total_rows, int64_t channels);
    ~NormSteps();
    int64_t factors() const;   // floats of what the other steps need to know of the channels
    int64_t partials() const;  // floats of the partial sums of all groups

    void moments(const BatchNormAct& call, int64_t group, float* partials) const;
    void merge_moments(const BatchNormAct& all, const float* partials, float* factors) const;  // writes mean and var
    void given_moments(const BatchNormActGradient& all, float* factors) const;
    void apply(const BatchNormAct& call, const float* factors) const;

    void sums(const BatchNormActGradient& call, int64_t group, const float* factors, float* partials) const;
    void merge_sums(const BatchNormActGradient& all, const float* partials, float* factors) const;
    void input_gradient(const BatchNormActGradient& call, const float* factors) const;

  private:
    const NormLines& cut(int64_t rows) const;
    std::unique_ptr<NormGroups> groups_;
    int64_t rows_;
};

// out = grad where its bit is set, else 0, of a multiple of 16 numbers.
void masked_gradient(const float* grad, const uint8_t* positive, int64_t count, float* out);

}  // namespace kr
