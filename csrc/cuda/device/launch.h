// What launches have in common: the size of a grid, and what the addresses allow.
#pragma once
#include <cstdint>

namespace kr {
namespace cuda {

constexpr int64_t kMostBlocks = 1 << 16;  // of a kernel whose threads go on to further items

inline unsigned grid_of(int64_t items, int64_t most) { return (unsigned)(items < 1 ? 1 : items < most ? items : most); }

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// The widest access, up to 16 bytes, that divides the address, the stride and the length of a row.
inline int access_of(const void* base, int64_t stride_bytes, int64_t row_bytes) {
    const uint64_t all = reinterpret_cast<uintptr_t>(base) | (uint64_t)stride_bytes | (uint64_t)row_bytes | 16u;
    return (int)(all & (~all + 1));
}

}  // namespace cuda
}  // namespace kr
