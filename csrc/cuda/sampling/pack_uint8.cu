#include "cuda/sampling/pack_uint8.h"

#include <cuda_runtime.h>

#include "cuda/device/element.h"
#include "cuda/device/launch.h"

namespace kr {
namespace cuda {
namespace {

// One thread per four bytes of the output, in its order: stores are whole, and the planes that a warp gathers from are
// read from memory once. Index is 32 bits wide where that is enough, for its divisions are several times cheaper.
template <class Index, bool kPlanes>
__global__ void pack(const void* __restrict__ x, Dtype dtype, Index total, Index channels, Index pixels,
                     bool wide_reads, uint8_t* __restrict__ out) {
    const uint64_t quads = ((uint64_t)total + 3) / 4, stride = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t quad = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; quad < quads; quad += stride) {
        const Index at = (Index)(4 * quad);
        const int count = total - at < 4 ? (int)(total - at) : 4;
        float value[4];
        if (kPlanes) {
            Index channel = at % channels, pixel = at / channels, image = pixel / pixels;
            pixel -= image * pixels;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                value[k] =
                    k < count ? read_element(x, dtype, (int64_t)((image * channels + channel) * pixels + pixel)) : 0.0f;
                if (++channel == channels) {
                    channel = 0;
                    if (++pixel == pixels) pixel = 0, ++image;
                }
            }
        } else if (wide_reads && count == 4) {
            if (dtype == Dtype::f32) {
                const float4 v = static_cast<const float4*>(x)[quad];
                value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
            } else {
                const uint2 v = static_cast<const uint2*>(x)[quad];
                const uint32_t words[2] = {v.x, v.y};
                if (dtype == Dtype::bf16)
                    BF16::expand(words, value);
                else
                    F16::expand(words, value);
            }
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k) value[k] = k < count ? read_element(x, dtype, (int64_t)at + k) : 0.0f;
        }
        if (count == 4) {
            uint32_t bytes = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) bytes |= (uint32_t)to_byte(value[k]) << (8 * k);
            reinterpret_cast<uint32_t*>(out)[quad] = bytes;
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (k < count) out[at + k] = to_byte(value[k]);
        }
    }
}

template <class Index>
void launch(const void* x, Dtype dtype, int64_t total, int64_t channels, int64_t pixels, bool planes, uint8_t* out,
            cudaStream_t queue) {
    const int threads = 256;
    const unsigned blocks = grid_of(((total + 3) / 4 + threads - 1) / threads, kMostBlocks);
    const bool wide = reinterpret_cast<uintptr_t>(x) % (dtype == Dtype::f32 ? 16 : 8) == 0;
    const Index size = (Index)total, depth = (Index)channels, plane = (Index)pixels;
    if (planes)
        pack<Index, true><<<blocks, threads, 0, queue>>>(x, dtype, size, depth, plane, wide, out);
    else
        pack<Index, false><<<blocks, threads, 0, queue>>>(x, dtype, size, depth, plane, wide, out);
}

}  // namespace

int pack_uint8(const void* x, Dtype dtype, int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
               uint8_t* out, void* cuda_stream) {
    const int64_t total = batch * channels * pixels;
    if (total == 0) return cudaSuccess;
    const bool planes = channels > 1 && !channels_last;
    auto queue = (cudaStream_t)cuda_stream;
    if (total < (int64_t)1 << 31)
        launch<uint32_t>(x, dtype, total, channels, pixels, planes, out, queue);
    else
        launch<uint64_t>(x, dtype, total, channels, pixels, planes, out, queue);
    return cudaGetLastError();
}

}  // namespace cuda
}  // namespace kr
