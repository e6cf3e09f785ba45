// Included once per instruction set by solver_step.cpp.
#include "common/philox.h"
#include "common/solver_row.h"

// Elements [begin, end) of one image; begin is a multiple of 4. One read of each input, one write.
static void solver_image(const float* x, const float* cond, const float* uncond, uint64_t id,
                         const float* const* history, const SolverRow& row, uint64_t seed, uint32_t stream,
                         int64_t begin, int64_t end, float* y) {
    const uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    u32v lane = u32v{};
#if KR_LANES > 1
    for (int i = 0; i < kLanes; ++i) lane[i] = (uint32_t)i;
#endif
    float noise[4 * kLanes];
    for (int64_t at = begin; at < end; at += 4 * kLanes) {
        if (row.noise != 0.0f) {
            f32v z[4];
            philox_normal4(splat_u((uint32_t)(at / 4)) + lane, splat_u(stream), splat_u((uint32_t)id),
                           splat_u((uint32_t)(id >> 32)), k0, k1, z);
            for (int k = 0; k < 4; ++k) {
                float lanes[kLanes];
                store(lanes, z[k]);
                for (int g = 0; g < kLanes; ++g) noise[4 * g + k] = lanes[g];
            }
        }
        for (int64_t i = at; i < at + 4 * kLanes && i < end; i += kLanes) {
            const int n = (int)(end - i < kLanes ? end - i : kLanes);
            const bool whole = n == kLanes;
            f32v xs = whole ? load(x + i) : load_part(x + i, n, 0.0f);
            f32v e = whole ? load(cond + i) : load_part(cond + i, n, 0.0f);
            if (uncond) e = guided(e, whole ? load(uncond + i) : load_part(uncond + i, n, 0.0f), row.guidance);
            f32v out = solver_terms(row, xs, e);
            for (int k = 0; k < row.terms; ++k)
                out = fma(splat(row.history[k]), whole ? load(history[k] + i) : load_part(history[k] + i, n, 0.0f), out);
            if (row.noise != 0.0f) out = fma(splat(row.noise), load(noise + (i - at)), out);
            if (whole)
                store(y + i, out);
            else
                store_part(y + i, out, n);
        }
    }
}
