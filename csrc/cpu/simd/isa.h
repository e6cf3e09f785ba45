// Which instruction set the kernels use, chosen at run time. Every kernel body is compiled once per level by
// foreach_isa.h; KR_DISPATCH calls the one that this machine (or KR_FAST_CPU_ISA) asks for.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace kr {

enum class Isa { scalar, avx2, avx512 };

Isa isa();                              // the level in use
void set_isa(const std::string& name);  // throws std::invalid_argument when the machine lacks it
std::string isa_name();
std::vector<std::string> isa_available();  // weakest first

}  // namespace kr

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define KR_X86 1
#define KR_DISPATCH(function, ...)                                          \
    (::kr::isa() == ::kr::Isa::avx512 ? ::kr::avx512::function(__VA_ARGS__) \
     : ::kr::isa() == ::kr::Isa::avx2 ? ::kr::avx2::function(__VA_ARGS__)   \
                                      : ::kr::scalar::function(__VA_ARGS__))
#else
#define KR_X86 0
#define KR_DISPATCH(function, ...) ::kr::scalar::function(__VA_ARGS__)
#endif
