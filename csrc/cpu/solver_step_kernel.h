// Included once per instruction set by solver_step.cpp.
#include "common/philox.h"
#include "common/solver_row.h"
#include "cpu/normal_block.h"

// The addresses of one image; uncond is null without guidance.
struct SolverImage {
    const float *x, *cond, *uncond;
    const float* history[4];
    float* y;
};

// n elements from `at` on, n <= kLanes; z points at the noise of those from `base` on. The flags are constants where
// this is called, so each combination compiles to straight code with the coefficients in registers.
KR_FN void solver_lanes(bool guide, bool clean, bool history, bool noisy, const SolverImage& image, const SolverRow& row,
                        const float* z, int64_t base, int64_t at, int n) {
    auto read = [=](const float* from) { return n == kLanes ? load(from + at) : load_part(from + at, n, 0.0f); };
    f32v x = read(image.x), e = read(image.cond);
    if (guide) e = guided(e, read(image.uncond), row.guidance);
    f32v y = solver_terms(row, clean, x, e);
    if (history)
        for (int k = 0; k < row.terms; ++k) y = fma(splat(row.history[k]), read(image.history[k]), y);
    if (noisy) y = fma(splat(row.noise), load(z + (at - base)), y);
    if (n == kLanes)
        store(image.y + at, y);
    else
        store_part(image.y + at, y, n);
}

KR_FN void solver_span(bool guide, bool clean, bool history, bool noisy, const SolverImage& image, const SolverRow row,
                       const float* z, int64_t begin, int64_t end) {
    int64_t at = begin;
    for (; at + kLanes <= end; at += kLanes) solver_lanes(guide, clean, history, noisy, image, row, z, begin, at, kLanes);
    if (at < end) solver_lanes(guide, clean, history, noisy, image, row, z, begin, at, (int)(end - at));
}

// Elements [begin, end) of one image; begin is a multiple of 4. One read of each input, one write.
static void solver_image(const SolverImage& image, uint64_t id, const SolverRow& row, uint64_t seed, uint32_t stream,
                         int64_t begin, int64_t end) {
    const bool guide = image.uncond, clean = row.x0 != 0.0f;
    if (row.noise != 0.0f) {
        float z[kBlockElements];
        for (int64_t at = begin; at < end; at += kBlockElements) {
            const int64_t stop = end - at < kBlockElements ? end : at + kBlockElements;
            normal_block(id, seed, stream, at, (int)(stop - at), z);
            solver_span(guide, clean, row.terms > 0, true, image, row, z, at, stop);
        }
    } else if (row.terms > 0) {
        solver_span(guide, clean, true, false, image, row, nullptr, begin, end);
    } else if (guide && clean) {
        solver_span(true, true, false, false, image, row, nullptr, begin, end);
    } else if (guide) {
        solver_span(true, false, false, false, image, row, nullptr, begin, end);
    } else if (clean) {
        solver_span(false, true, false, false, image, row, nullptr, begin, end);
    } else {
        solver_span(false, false, false, false, image, row, nullptr, begin, end);
    }
}
