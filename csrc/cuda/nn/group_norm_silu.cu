#include "cuda/nn/group_norm_silu.h"

#include <cuda_runtime.h>

#include <utility>

#include "cuda/device/element.h"
#include "cuda/device/launch.h"

namespace kr {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kRowBytes = 128;        // of adjacent channels that a block reads at a time
constexpr int64_t kResident = 112 << 10;  // shared memory of a block: two of them fit a multiprocessor
constexpr int64_t kAlways = 48 << 10;     // what a block of every device has without asking
constexpr int64_t kWidest = 4096;         // channels of a block, of each of which it keeps three floats in kAlways

// V elements at element `at`: one access of 16 bytes where V is not 1.
template <int V>
__device__ void read(const void* from, Dtype dtype, int64_t at, float (&to)[V]) {
    if (V == 1) {
        to[0] = read_element(from, dtype, at);
    } else if (V == 4) {
        const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(from) + at);
        to[0] = v.x, to[1 % V] = v.y, to[2 % V] = v.z, to[3 % V] = v.w;
    } else {
        const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + at);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const uint16_t bits = (uint16_t)(words[k / 2] >> (k % 2 * 16));
            to[k] = dtype == Dtype::bf16 ? bf16_to_float(bits) : half_to_float(bits);
        }
    }
}

template <int V>
__device__ void write(void* to, Dtype dtype, int64_t at, const float (&from)[V]) {
    if (V == 1) {
        write_element(to, dtype, at, from[0]);
    } else if (V == 4) {
        *reinterpret_cast<float4*>(static_cast<float*>(to) + at) =
            make_float4(from[0], from[1 % V], from[2 % V], from[3 % V]);
    } else {
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float low = from[2 * k % V], high = from[(2 * k + 1) % V];
            words[k] = dtype == Dtype::bf16 ? float_to_bf16(low) | (uint32_t)float_to_bf16(high) << 16
                                            : float_to_half(low) | (uint32_t)float_to_half(high) << 16;
        }
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + at) = {words[0], words[1], words[2], words[3]};
    }
}

// One block takes `together` groups of one sample, [pixels, width] elements of which each thread reads vectors of
// always the same channels. Where they fit, shared memory keeps them, so that the three sweeps (mean, squares about it,
// result) read global memory once; else the later sweeps find them in L2. Sums are taken in a fixed order.
//
// Shared memory: `partial`, [rows][width] sums by thread, later the scale of each channel; `offset` by channel; `group`
// by group; the elements.
template <int V, bool kKeep>
__global__ void __launch_bounds__(kThreads, 3) norm(const GroupNorm call, int together, int room, int width_room) {
    extern __shared__ float4 shared[];
    float* partial = reinterpret_cast<float*>(shared);
    float *offset = partial + room, *group = offset + width_room;
    void* kept = group + width_room;
    const int64_t channels = call.x_channels + call.skip_channels;
    const int size = (int)(channels / call.groups), parts = (int)((call.groups + together - 1) / together);
    const int64_t sample = blockIdx.x / parts;
    const int first_group = (int)(blockIdx.x % parts) * together;
    const int groups = call.groups - first_group < together ? (int)(call.groups - first_group) : together;
    const int64_t first = (int64_t)first_group * size;
    const int width = groups * size, slots = width / V, thread = (int)threadIdx.x;
    const int rows = slots < kThreads ? kThreads / slots : 1, step = slots < kThreads ? slots : kThreads;
    const int row = thread / step, slot0 = row < rows ? thread % step : slots;

    auto source = [&](int64_t pixel, int slot, float (&value)[V]) {
        const int64_t channel = first + slot * V, at = sample * call.pixels + pixel;
        if (channel < call.x_channels)
            read<V>(call.x, call.dtype, at * call.x_channels + channel, value);
        else
            read<V>(call.skip, call.dtype, at * call.skip_channels + channel - call.x_channels, value);
    };
    auto again = [&](int64_t pixel, int slot, float (&value)[V]) {
        if (kKeep)
            read<V>(kept, call.dtype, (pixel * slots + slot) * V, value);
        else
            source(pixel, slot, value);
    };
    auto shift_of = [&](int channel) {
        return call.shift ? read_element(call.shift, call.shift_dtype, sample * call.shift_stride + first + channel)
                          : 0.0f;
    };
    auto column = [&](int channel) {
        float total = 0.0f;
        for (int r = 0; r < rows; ++r) total += partial[r * width + channel];
        return total;
    };

    for (int slot = slot0; slot < slots; slot += step) {
        float sum[V] = {}, value[V];
#pragma unroll 4
        for (int64_t pixel = row; pixel < call.pixels; pixel += rows) {
            source(pixel, slot, value);
            // Exact: the values came from elements of this type.
            if (kKeep) write<V>(kept, call.dtype, (pixel * slots + slot) * V, value);
#pragma unroll
            for (int k = 0; k < V; ++k) sum[k] += value[k];
        }
#pragma unroll
        for (int k = 0; k < V; ++k) partial[row * width + slot * V + k] = sum[k];
    }
    __syncthreads();
    for (int c = thread; c < width; c += kThreads) offset[c] = column(c) / (float)call.pixels + shift_of(c);
    __syncthreads();
    for (int g = thread; g < groups; g += kThreads) {
        float total = 0.0f;
        for (int c = g * size; c < (g + 1) * size; ++c) total += offset[c];
        group[g] = total / (float)size;
    }
    __syncthreads();
    for (int c = thread; c < width; c += kThreads) offset[c] = shift_of(c) - group[c / size];
    __syncthreads();
    for (int slot = slot0; slot < slots; slot += step) {
        float squares[V] = {}, value[V];
#pragma unroll 4
        for (int64_t pixel = row; pixel < call.pixels; pixel += rows) {
            again(pixel, slot, value);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                const float d = value[k] + offset[slot * V + k];
                squares[k] += d * d;
            }
        }
#pragma unroll
        for (int k = 0; k < V; ++k) partial[row * width + slot * V + k] = squares[k];
    }
    __syncthreads();
    for (int c = thread; c < width; c += kThreads) partial[c] = column(c);
    __syncthreads();
    for (int g = thread; g < groups; g += kThreads) {
        float total = 0.0f;
        for (int c = g * size; c < (g + 1) * size; ++c) total += partial[c];
        group[g] = 1.0f / sqrtf(total / ((float)call.pixels * (float)size) + call.eps);
    }
    __syncthreads();
    for (int c = thread; c < width; c += kThreads) {
        const float weight = call.weight ? read_element(call.weight, call.affine_dtype, first + c) : 1.0f;
        const float bias = call.bias ? read_element(call.bias, call.affine_dtype, first + c) : 0.0f;
        const float scale = weight * group[c / size];
        partial[c] = scale;
        offset[c] = fmaf(offset[c], scale, bias);
    }
    __syncthreads();
    for (int slot = slot0; slot < slots; slot += step) {
        float scale[V], add[V], value[V];
#pragma unroll
        for (int k = 0; k < V; ++k) scale[k] = partial[slot * V + k], add[k] = offset[slot * V + k];
        for (int64_t pixel = row; pixel < call.pixels; pixel += rows) {
            again(pixel, slot, value);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                value[k] = fmaf(value[k], scale[k], add[k]);
                if (call.silu) value[k] = __fdividef(value[k], 1.0f + expf(-value[k]));
            }
            write<V>(call.y, call.dtype, (sample * call.pixels + pixel) * channels + first + slot * V, value);
        }
    }
}

// Floats of the partial sums: a row of the width for each thread's vector, or one row where there are more vectors.
int64_t partial_room(int64_t width, int vector) {
    const int64_t slots = width / vector, rows = slots < kThreads ? kThreads / slots : 1;
    return (rows * width + 3) / 4 * 4;
}

// Whether the kernel may have so many bytes of shared memory. Its limit becomes kResident, or the device's most, and
// not what this call needs: another thread may launch for a larger sample at the same time.
template <class Kernel>
bool allows(Kernel* kernel, int64_t bytes) {
    int device = 0, most = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (most > kResident) most = (int)kResident;
    if (status == cudaSuccess && bytes <= most)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (status != cudaSuccess) cudaGetLastError();  // it is dealt with here, and not by the next launch
    return status == cudaSuccess && bytes <= most;
}

template <int V>
int launch(const GroupNorm& call, cudaStream_t queue) {
    const int64_t channels = call.x_channels + call.skip_channels, size = channels / call.groups;
    const int64_t element = call.dtype == Dtype::f32 ? 4 : 2;
    auto groups_for = [&](int64_t bytes) {
        int64_t together = 1;
        while (together < call.groups && (together * size * element < bytes || together * size % V)) ++together;
        return together;
    };
    auto bytes_of = [&](int64_t width, bool keep) {
        const int64_t rounded = (width + 3) / 4 * 4;
        // The last block may have fewer groups, so more rows: room for the largest of both.
        const int64_t last = channels % width ? channels % width : width;
        const int64_t room =
            partial_room(width, V) > partial_room(last, V) ? partial_room(width, V) : partial_room(last, V);
        return std::make_pair(4 * (room + 2 * rounded) + (keep ? call.pixels * width * element : 0), room);
    };
    int64_t together = groups_for(kRowBytes);
    if (bytes_of(together * size, true).first > kResident) together = groups_for(kRowBytes / 2);
    const int64_t width = together * size, width_room = (width + 3) / 4 * 4;
    if (V > 1 && width > kWidest) return launch<1>(call, queue);  // wide groups together for the vectors' sake
    bool keep = bytes_of(width, true).first <= kResident;
    const int64_t blocks = call.batch * ((call.groups + together - 1) / together);
    if (blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
    auto [bytes, room] = bytes_of(width, keep);
    if (keep && bytes > kAlways && !allows(norm<V, true>, bytes)) {  // a GPU with less shared memory
        keep = false;
        bytes = bytes_of(width, false).first;
    }
    if (keep)
        norm<V, true><<<(unsigned)blocks, kThreads, bytes, queue>>>(call, (int)together, (int)room, (int)width_room);
    else
        norm<V, false><<<(unsigned)blocks, kThreads, bytes, queue>>>(call, (int)together, (int)room, (int)width_room);
    return cudaGetLastError();
}

}  // namespace

int group_norm_silu(const GroupNorm& call, void* cuda_stream) {
    if (call.batch * call.pixels == 0) return cudaSuccess;
    const int vector = call.dtype == Dtype::f32 ? 4 : 8;
    const bool whole = call.x_channels % vector == 0 && call.skip_channels % vector == 0 && aligned(call.x) &&
                       aligned(call.skip) && aligned(call.y);
    auto queue = (cudaStream_t)cuda_stream;
    if (!whole) return launch<1>(call, queue);
    return vector == 4 ? launch<4>(call, queue) : launch<8>(call, queue);
}

}  // namespace cuda
}  // namespace kr
