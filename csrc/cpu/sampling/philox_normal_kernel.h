// Included once per instruction set by philox_normal.cpp.
#include "common/sampling/philox.h"
#include "cpu/sampling/normal_block.h"

// Fills out[begin, end) of one image's normals. begin is a multiple of 4.
static void normals_of_image(uint64_t id, uint64_t seed, uint32_t stream, int64_t begin, int64_t end, float* out) {
    for (int64_t at = begin; at < end; at += kBlockElements)
        normal_block(id, seed, stream, at, (int)(end - at < kBlockElements ? end - at : kBlockElements), out + at);
}
