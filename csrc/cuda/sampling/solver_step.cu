#include "cuda/sampling/solver_step.h"

#include <cuda_runtime.h>

#include "cuda/device/element.h"
#include "cuda/device/launch.h"

namespace kr {
namespace cuda {
namespace {

#include "common/sampling/philox.h"
#include "common/sampling/solver_row.h"

constexpr int kThreads = 256;
// Blocks of a multiprocessor at a time: four by 64 registers a thread, of which compute capability 10.0 would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocks = 3;
#else
constexpr int kBlocks = 4;
#endif

// The step that the table's counter names: its row, and the ring slots as this call's addresses.
__device__ void look_up(SolverStep& call) {
    const SolverTable& table = call.table;
    const int64_t step = *table.step, numel = call.batch * call.channels * call.pixels;
    const float* from = table.rows + step * kSolverTableRow;
    call.row = solver_row(from, (int)from[kSolverTableRow - 1], call.row.guidance);
    const int32_t* slots = table.slots + step * kSolverTableSlots;
    call.x = table.samples + slots[0] * numel;
    call.y = table.samples + slots[1] * numel;
    call.kept = slots[2] < 0 ? nullptr : table.kept + slots[2] * numel;
#pragma unroll
    for (int k = 0; k < kSolverHistory; ++k) {
        const int slot = slots[4 + k];
        call.history[k] = slot < 0 ? table.samples + (-1 - slot) * numel : table.kept + slot * numel;
    }
    call.stream += (uint32_t)step;
}

// One thread per four elements of an image: one Philox counter, and 16-byte accesses where rows are aligned. Tensors
// of interleaved channels are read and written element by element; neighbours in a warp share their cache lines.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks) step(SolverStep call) {
    if (call.table.step) {
        if (*call.table.step < 0 || *call.table.step >= call.table.steps) return;
        look_up(call);
    }
    const SolverRow& row = call.row;
    const int64_t numel = call.channels * call.pixels, groups = (numel + 3) / 4;
    const int64_t total = call.batch * groups, stride = (int64_t)gridDim.x * blockDim.x;
    const bool clean = row.x0 != 0.0f || (call.kept && row.keep[2] != 0.0f);
    for (int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; item < total; item += stride) {
        const int64_t image = item / groups, group = item % groups, at = image * numel + 4 * group;
        const int count = kAligned ? 4 : (int)(numel - 4 * group < 4 ? numel - 4 * group : 4);
        auto read = [&](const float* from, float (&to)[4]) {
            if (kAligned) {
                const float4 v = *reinterpret_cast<const float4*>(from + at);
                to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
            } else {
#pragma unroll
                for (int k = 0; k < 4; ++k) to[k] = k < count ? from[at + k] : 0.0f;
            }
        };
        auto write = [&](float* to, const float (&from)[4]) {
            if (kAligned) {
                *reinterpret_cast<float4*>(to + at) = make_float4(from[0], from[1], from[2], from[3]);
            } else {
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    if (k < count) to[at + k] = from[k];
            }
        };
        auto interleaved = [&](int k) {  // where element k lies among interleaved channels
            const int64_t element = 4 * group + k;
            return image * numel + element % call.pixels * call.channels + element / call.pixels;
        };
        auto read_network = [&](const void* from, float (&to)[4]) {
            if (kAligned && call.output_dtype == Dtype::f32 && !call.output_channels_last) {
                read(static_cast<const float*>(from), to);
            } else {
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    to[k] = k < count ? read_element(from, call.output_dtype,
                                                     call.output_channels_last ? interleaved(k) : at + k)
                                      : 0.0f;
            }
        };
        float x[4], e[4], other[4], out[4], kept[4];
        read(call.x, x);
        read_network(call.cond, e);
        if (call.uncond) {
            read_network(call.uncond, other);
#pragma unroll
            for (int k = 0; k < 4; ++k) e[k] = guided(e[k], other[k], row.guidance);
        }
        const float limit = call.limits ? call.limits[image] : row.clip;
        const float inverse = call.limits ? 1.0f / limit : 1.0f;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float p = clean ? solver_clean(row, limit, inverse, x[k], e[k]) : 0.0f;
            out[k] = solver_terms(row, clean, x[k], e[k], p);
            kept[k] = solver_kept(row, clean, x[k], e[k], p);
        }
        if (call.kept) write(call.kept, kept);
#pragma unroll
        for (int term = 0; term < kSolverHistory; ++term) {
            if (term < row.terms) {
                read(call.history[term], other);
#pragma unroll
                for (int k = 0; k < 4; ++k) out[k] = fma(row.history[term], other[k], out[k]);
            }
        }
        if (row.noise != 0.0f) {
            const uint64_t id = (uint64_t)call.ids[image];
            philox_normal4((uint32_t)group, call.stream, (uint32_t)id, (uint32_t)(id >> 32), (uint32_t)call.seed,
                           (uint32_t)(call.seed >> 32), other);
#pragma unroll
            for (int k = 0; k < 4; ++k) out[k] = fma(row.noise, other[k], out[k]);
        }
        if (call.y) write(call.y, out);
        if (call.input || call.image) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (k >= count) continue;
                const int64_t offset = interleaved(k);
                if (call.image) call.image[offset] = to_byte(out[k]);
                for (int copy = 0; call.input && copy < call.copies; ++copy)
                    write_element(call.input, call.input_dtype, copy * call.batch * numel + offset,
                                  mul(out[k], row.next_input));
            }
        }
    }
}

}  // namespace

int solver_step(const SolverStep& call, void* cuda_stream) {
    const int64_t numel = call.channels * call.pixels, total = call.batch * ((numel + 3) / 4);
    if (total == 0) return cudaSuccess;
    bool vector = numel % 4 == 0;
    for (const void* address : {(const void*)call.x, call.cond, call.uncond, (const void*)call.y,
                                (const void*)call.kept, (const void*)call.table.samples, (const void*)call.table.kept})
        vector = vector && aligned(address);
    for (const float* address : call.history) vector = vector && aligned(address);
    const unsigned blocks = grid_of((total + kThreads - 1) / kThreads, kMostBlocks);
    auto queue = (cudaStream_t)cuda_stream;
    if (vector)
        step<true><<<blocks, kThreads, 0, queue>>>(call);
    else
        step<false><<<blocks, kThreads, 0, queue>>>(call);
    return cudaGetLastError();
}

}  // namespace cuda
}  // namespace kr
