#include "cpu/simd/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace kr {
namespace {

bool supported(Isa level) {
    if (level == Isa::scalar) return true;
#if KR_X86
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(KR_EMULATE_AVX512)
    return avx2;
#endif
    if (level == Isa::avx2) return avx2;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

constexpr Isa kLevels[] = {Isa::scalar, Isa::avx2, Isa::avx512};
const char* name_of(Isa level) { return level == Isa::avx512 ? "avx512" : level == Isa::avx2 ? "avx2" : "scalar"; }

Isa best() {
    Isa found = Isa::scalar;
    for (Isa level : kLevels)
        if (supported(level)) found = level;
    return found;
}

Isa current = best();

}  // namespace

Isa isa() { return current; }
std::string isa_name() { return name_of(current); }

std::vector<std::string> isa_available() {
    std::vector<std::string> names;
    for (Isa level : kLevels)
        if (supported(level)) names.push_back(name_of(level));
    return names;
}

void set_isa(const std::string& name) {
    for (Isa level : kLevels)
        if (name == name_of(level) && supported(level)) {
            current = level;
            return;
        }
    std::string known;
    for (const std::string& each : isa_available()) known += (known.empty() ? "" : ", ") + each;
    throw std::invalid_argument("KR_FAST_CPU_ISA must be one of " + known + " on this machine, got " + name);
}

}  // namespace kr
