// Included once per instruction set by solver_step.cpp.
#include "common/sampling/philox.h"
#include "common/sampling/solver_row.h"
#include "cpu/sampling/normal_block.h"
#include "cpu/sampling/pack_uint8_kernel.h"

// The addresses of one image; those that are not in use are null.
struct SolverImage {
    const float *x, *cond, *uncond;
    const float* history[4];
    float *y, *kept;
    float limit, inverse;
};

// What a step does. The flags are constants where spans are called, so each combination that is common compiles to
// straight code with the coefficients in registers.
struct SolverShape {
    bool guide, clean, noisy, keep;
    int terms;  // history terms, or -1 for those of the row
};

// n elements from `at` on, n <= kLanes; z points at the noise of those from `base` on.
KR_FN void solver_lanes(SolverShape shape, const SolverImage& image, const SolverRow& row, const float* z, int64_t base,
                        int64_t at, int n) {
    auto read = [=](const float* from) { return n == kLanes ? load(from + at) : load_part(from + at, n, 0.0f); };
    auto write = [=](float* to, f32v value) {
        if (n == kLanes)
            store(to + at, value);
        else
            store_part(to + at, value, n);
    };
    f32v x = read(image.x), e = read(image.cond);
    if (shape.guide) e = guided(e, read(image.uncond), row.guidance);
    const f32v p = shape.clean ? solver_clean(row, image.limit, image.inverse, x, e) : f32v{};
    f32v y = solver_terms(row, shape.clean, x, e, p);
    const int terms = shape.terms < 0 ? row.terms : shape.terms;
    for (int k = 0; k < terms; ++k) y = fma(splat(row.history[k]), read(image.history[k]), y);
    if (shape.noisy) y = fma(splat(row.noise), load(z + (at - base)), y);
    if (shape.keep) write(image.kept, solver_kept(row, shape.clean, x, e, p));
    write(image.y, y);
}

KR_FN void solver_span(SolverShape shape, const SolverImage& image, const SolverRow row, const float* z, int64_t begin,
                       int64_t end) {
    int64_t at = begin;
    for (; at + kLanes <= end; at += kLanes) solver_lanes(shape, image, row, z, begin, at, kLanes);
    if (at < end) solver_lanes(shape, image, row, z, begin, at, (int)(end - at));
}

// The network's next input of one image: scale * y in `dtype`, channels interleaved.
static void solver_input(const float* y, int64_t channels, int64_t pixels, float scale, Dtype dtype, void* out) {
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < pixels; i += kLanes) {
            const int n = (int)(pixels - i < kLanes ? pixels - i : kLanes);
            const float* from = y + c * pixels + i;
            float lanes[kLanes];
            const f32v value = mul(n == kLanes ? load(from) : load_part(from, n, 0.0f), splat(scale));
            std::memcpy(lanes, &value, sizeof lanes);
            if (dtype == Dtype::f32) {
                float* to = (float*)out + i * channels + c;
                for (int k = 0; k < n; ++k) to[k * channels] = lanes[k];
            } else {
                uint16_t* to = (uint16_t*)out + i * channels + c;
                for (int k = 0; k < n; ++k)
                    to[k * channels] = dtype == Dtype::bf16 ? float_to_bf16(lanes[k]) : float_to_half(lanes[k]);
            }
        }
    }
}

// Elements [begin, end) of one image; begin is a multiple of 4. One read of each input, one write of each output.
static void solver_image(const SolverStep& call, int64_t index, int64_t begin, int64_t end, float* y) {
    const SolverRow& row = call.row;
    const int64_t numel = call.channels * call.pixels, offset = index * numel;
    SolverImage image = {call.x + offset,
                         static_cast<const float*>(call.cond) + offset,
                         call.uncond ? static_cast<const float*>(call.uncond) + offset : nullptr,
                         {},
                         y,
                         call.kept ? call.kept + offset : nullptr,
                         row.clip,
                         1.0f};
    if (call.limits) {
        image.limit = call.limits[index];
        image.inverse = 1.0f / image.limit;
    }
    for (int k = 0; k < row.terms; ++k) image.history[k] = call.history[k] + offset;
    const bool guide = image.uncond, keep = image.kept, clean = row.x0 != 0.0f || (keep && row.keep[2] != 0.0f);
    if (row.noise != 0.0f) {
        const SolverShape shape = {guide, clean, true, keep, -1};
        float z[kBlockElements];
        for (int64_t at = begin; at < end; at += kBlockElements) {
            const int64_t stop = end - at < kBlockElements ? end : at + kBlockElements;
            normal_block((uint64_t)call.ids[index], call.seed, call.stream, at, (int)(stop - at), z);
            solver_span(shape, image, row, z, at, stop);
        }
    } else if (keep && row.terms == 1 && !clean) {  // two-step solvers
        if (guide)
            solver_span({true, false, false, true, 1}, image, row, nullptr, begin, end);
        else
            solver_span({false, false, false, true, 1}, image, row, nullptr, begin, end);
    } else if (keep || row.terms > 0) {
        solver_span({guide, clean, false, keep, -1}, image, row, nullptr, begin, end);
    } else if (guide && clean) {
        solver_span({true, true, false, false, 0}, image, row, nullptr, begin, end);
    } else if (guide) {
        solver_span({true, false, false, false, 0}, image, row, nullptr, begin, end);
    } else if (clean) {
        solver_span({false, true, false, false, 0}, image, row, nullptr, begin, end);
    } else {
        solver_span({false, false, false, false, 0}, image, row, nullptr, begin, end);
    }
    if (call.input) {
        const int64_t size = call.input_dtype == Dtype::f32 ? 4 : 2;
        for (int copy = 0; copy < call.copies; ++copy)
            solver_input(y, call.channels, call.pixels, row.next_input, call.input_dtype,
                         (char*)call.input + size * (copy * call.batch * numel + offset));
    }
    if (call.image) pack_image(y, call.channels, call.pixels, call.image + offset);
}
