// Short rows, one for each thread of a block. They are too short for wide loads, but a tile of them is one piece of
// memory: it is copied through shared memory by 16-byte accesses, with an odd row length there, so that the threads'
// walks along their rows meet no bank conflict.
#pragma once
#include <cuda_runtime.h>

#include "cuda/device/rows.h"

namespace kr {
namespace cuda {

template <int THREADS>
struct Tile {
    int64_t first;
    int rows, classes, length;  // length of a row in shared memory
    unsigned inverse;           // 2^32 / classes, rounded up: exact quotients of the tile's element numbers

    // The tile of this number of a tensor's rows.
    KR_INLINE Tile(int64_t number, int64_t all, int classes)
        : first(number * THREADS),
          rows((int)(all - first < THREADS ? all - first : THREADS)),
          classes(classes),
          length(classes | 1),
          inverse(0xFFFFFFFFu / (unsigned)classes + 1) {}
    KR_INLINE int offset(int element, int& column) const {
        const int row = (int)__umulhi((unsigned)element, inverse);
        column = element - row * classes;
        return row * length + column;
    }
};

template <class E, int THREADS>
KR_FN void copy_in(const Tile<THREADS>& tile, const void* base, int64_t stride, float* to) {
    constexpr int kEach = 16 / E::size;
    const char* from = static_cast<const char*>(base) + tile.first * stride * E::size;
    const int total = tile.rows * tile.classes;
    int start = 0, column;
    if (stride == tile.classes && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        start = total / kEach * kEach;
        for (int at = (int)threadIdx.x * kEach; at < start; at += THREADS * kEach) {
            uint32_t words[4];
            float x[kEach];
            read_words<16>(from + at * E::size, 16, 0u, words);
            E::expand(words, x);
            int offset = tile.offset(at, column);
#pragma unroll
            for (int k = 0; k < kEach; ++k) {
                to[offset++] = x[k];
                if (++column == tile.classes) column = 0, offset += tile.length - tile.classes;
            }
        }
    }
    for (int at = start + (int)threadIdx.x; at < total; at += THREADS) {
        const int offset = tile.offset(at, column), row = (at - column) / tile.classes;
        to[offset] = E::one(base, (tile.first + row) * stride + column);
    }
}

template <class E, int THREADS>
KR_FN void copy_out(const Tile<THREADS>& tile, const float* from, void* base) {
    constexpr int kEach = 16 / E::size;
    char* to = static_cast<char*>(base) + tile.first * tile.classes * E::size;
    const int total = tile.rows * tile.classes;
    int start = 0, column;
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        start = total / kEach * kEach;
        for (int at = (int)threadIdx.x * kEach; at < start; at += THREADS * kEach) {
            uint32_t words[4];
            float x[kEach];
            int offset = tile.offset(at, column);
#pragma unroll
            for (int k = 0; k < kEach; ++k) {
                x[k] = from[offset++];
                if (++column == tile.classes) column = 0, offset += tile.length - tile.classes;
            }
            E::pack(x, words);
            write_words<16>(to + at * E::size, 16, words);
        }
    }
    for (int at = start + (int)threadIdx.x; at < total; at += THREADS) {
        const int offset = tile.offset(at, column);
        E::set_one(base, tile.first * tile.classes + at, from[offset]);
    }
}

}  // namespace cuda
}  // namespace kr
