#pragma once
#include <cstddef>
#include <cstdint>

namespace kr {

// CRC-32 of zip and PNG (polynomial 0x04C11DB7, reflected) of the bytes so far, continued over `data`; 0 to begin with.
// Carry-less multiplication where the machine has it (and KR_FAST_CPU_ISA is not scalar), else slicing by 16.
uint32_t crc32(uint32_t crc, const uint8_t* data, size_t size);

}  // namespace kr
