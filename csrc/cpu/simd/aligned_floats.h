// Memory of a call, at a multiple of 64 bytes.
#pragma once
#include <cstdint>
#include <memory>

namespace kr {

struct AlignedFloats {
    explicit AlignedFloats(int64_t count) : memory(new float[count + 16]) {
        floats = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / 4;
    }
    std::unique_ptr<float[]> memory;
    float* floats;
};

}  // namespace kr
