// Rows of float32, bfloat16 or float16 to registers and back: a lane holds chunks of V neighbouring elements as float.
#pragma once
#include <cstdint>

#include "cuda/device/element.h"

namespace kr {
namespace cuda {

template <int N>
struct Bytes {
    static constexpr int value = N;
};

// The words at `from` by accesses of BYTES. `left` bytes of the row are left there, a multiple of BYTES (or none, or
// less than none): words beyond are `fill`.
template <int BYTES, int W>
KR_FN void read_words(const char* from, int left, uint32_t fill, uint32_t (&to)[W]) {
#pragma unroll
    for (int k = 0; k < W; k += (BYTES < 4 ? 1 : BYTES / 4)) {
        const char* at = from + 4 * k;
        const bool inside = 4 * k < left;
        if (BYTES == 16) {
            uint4 v = {fill, fill, fill, fill};
            if (inside) v = __ldg(reinterpret_cast<const uint4*>(at));
            to[k] = v.x, to[k + 1 < W ? k + 1 : 0] = v.y, to[k + 2 < W ? k + 2 : 0] = v.z,
            to[k + 3 < W ? k + 3 : 0] = v.w;
        } else if (BYTES == 8) {
            uint2 v = {fill, fill};
            if (inside) v = __ldg(reinterpret_cast<const uint2*>(at));
            to[k] = v.x, to[k + 1 < W ? k + 1 : 0] = v.y;
        } else if (BYTES == 4) {
            to[k] = inside ? __ldg(reinterpret_cast<const uint32_t*>(at)) : fill;
        } else {
            const uint32_t low = inside ? __ldg(reinterpret_cast<const uint16_t*>(at)) : fill & 0xFFFFu;
            const uint32_t high = 4 * k + 2 < left ? __ldg(reinterpret_cast<const uint16_t*>(at + 2)) : fill & 0xFFFFu;
            to[k] = low | high << 16;
        }
    }
}

template <int BYTES, int W>
KR_FN void write_words(char* to, int left, const uint32_t (&from)[W]) {
#pragma unroll
    for (int k = 0; k < W; k += (BYTES < 4 ? 1 : BYTES / 4)) {
        char* at = to + 4 * k;
        if (4 * k >= left) continue;
        if (BYTES == 16)
            *reinterpret_cast<uint4*>(at) = {from[k], from[k + 1 < W ? k + 1 : 0], from[k + 2 < W ? k + 2 : 0],
                                             from[k + 3 < W ? k + 3 : 0]};
        else if (BYTES == 8)
            *reinterpret_cast<uint2*>(at) = {from[k], from[k + 1 < W ? k + 1 : 0]};
        else if (BYTES == 4)
            *reinterpret_cast<uint32_t*>(at) = from[k];
        else {
            *reinterpret_cast<uint16_t*>(at) = (uint16_t)from[k];
            if (4 * k + 2 < left) *reinterpret_cast<uint16_t*>(at + 2) = (uint16_t)(from[k] >> 16);
        }
    }
}

// Lane `lane` of LANES holds the elements first + (c * LANES + lane) * V + k, c < CHUNKS, k < V.
template <int V, int CHUNKS, int LANES>
struct Layout {
    static constexpr int count = V * CHUNKS;
    static constexpr int columns = V * CHUNKS * LANES;
    static KR_INLINE int column(int lane, int index) { return (index / V * LANES + lane) * V + index % V; }
};

// A row into registers, by accesses of 16 or 8 bytes where `access` allows it, which divides the row's address and
// length, else of one element; elements beyond the row are -inf, or 0 with zero_fill.
template <class E, int V, int CHUNKS, int LANES>
KR_FN void read_row(const void* base, int64_t at, int access, int first, int classes, int lane, bool zero_fill,
                    float (&to)[V * CHUNKS]) {
    constexpr int kWords = V * E::size / 4, kMost = kWords * 4;
    const uint32_t fill = zero_fill ? 0u : E::minus_inf;
    const char* row = static_cast<const char*>(base) + at * E::size;
    auto all = [&](auto bytes) {
        constexpr int kBytes = decltype(bytes)::value;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const int column = first + (c * LANES + lane) * V;
            uint32_t words[kWords];
            read_words<kBytes>(row + (int64_t)column * E::size, (classes - column) * E::size, fill, words);
            E::expand(words, to + c * V);
        }
    };
    if (access >= 16 && kMost >= 16)
        all(Bytes<kMost >= 16 ? 16 : 8>());
    else if (access >= 8)
        all(Bytes<8>());
    else
        all(Bytes<E::size>());
}

template <class E, int V, int CHUNKS, int LANES>
KR_FN void write_row(void* base, int64_t at, int access, int first, int classes, int lane,
                     const float (&from)[V * CHUNKS]) {
    constexpr int kWords = V * E::size / 4, kMost = kWords * 4;
    char* row = static_cast<char*>(base) + at * E::size;
    auto all = [&](auto bytes) {
        constexpr int kBytes = decltype(bytes)::value;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const int column = first + (c * LANES + lane) * V;
            uint32_t words[kWords];
            E::pack(from + c * V, words);
            write_words<kBytes>(row + (int64_t)column * E::size, (classes - column) * E::size, words);
        }
    };
    if (access >= 16 && kMost >= 16)
        all(Bytes<kMost >= 16 ? 16 : 8>());
    else if (access >= 8)
        all(Bytes<8>());
    else
        all(Bytes<E::size>());
}

}  // namespace cuda
}  // namespace kr
