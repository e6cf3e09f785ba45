#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kr {

// indices [records, rows], not negative; grad [records, rows, size] of type dtype.
struct EmbeddingGradNorms {
    const int64_t* indices;
    const void* grad;
    int64_t records, rows, size;
    Dtype dtype;
    int64_t padding;  // an index whose row of the table takes no gradient, or -1
    float* norms;     // [records]
};

void embedding_grad_norms(const EmbeddingGradNorms& call, int threads);

}  // namespace kr
