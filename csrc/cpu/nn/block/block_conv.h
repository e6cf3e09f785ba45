// A convolution of a residual block by Winograd's algorithm or by the definition, for groups of images.
#pragma once
#include "cpu/nn/direct_conv2d.h"
#include "cpu/nn/block/residual_block.h"

namespace kr {

// Chunks whose sums of the gradients of filters are made apart, from their floats and the tiles of the batch.
int64_t chunks_of_sums(int64_t groups, int64_t floats, int64_t tiles);

// Everything but packing and finishing runs on the calling thread, in memory of the caller: scratch() floats forward
// and backward_scratch() floats backward.
class BlockConv {
  public:
    BlockConv(const ResidualBlock& block, int layer);
    int64_t output_pixels() const { return shape_.output_height * shape_.output_width; }
    int64_t output_tiles() const;
    int64_t images_of_group(int64_t batch) const;

    int64_t packed_size(bool turned) const;
    void pack(bool turned, float* packed, int threads) const;
    int64_t scratch() const;
    int64_t backward_scratch() const;
    void forward(const float* x, int64_t images, const float* packed, float* y, float* scratch) const;
    // With `more` what its `bits` leave of it is added, else nothing or, with `adds`, what grad_x holds.
    void grad_input(const float* grad, int64_t images, const float* packed, float* grad_x, bool adds, const float* more,
                    const uint8_t* bits, float* scratch) const;
    int64_t sums() const;  // floats that grad_weight adds to, or writes the first time
    void grad_weight(const float* x, const float* grad, int64_t images, bool first, float* sums, float* scratch) const;
    void finish(const float* sums, int64_t chunks, int64_t step, float* grad_weight, int threads) const;

  private:
    int workers(int threads) const;
    bool winograd_;
    DirectConvShape shape_;
    const float* weight_;
    DirectConvSteps steps_;
    const double* transform_;
};

}  // namespace kr
