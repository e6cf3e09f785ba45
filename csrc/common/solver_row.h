// One element of a linear solver step; lane types and primitives as in philox.h. No include guard on purpose.
// Each line is one fused multiply-add, always in this order: the same bits on every device.

struct SolverRow {
    float x0_sample, x0_model, clip, sample, model, x0, noise, next_input;
    float history[4];
    float guidance;
    int terms;  // history terms in use
};

KR_FN f32v guided(f32v cond, f32v uncond, float guidance) { return fma(splat(guidance), cond - uncond, uncond); }

KR_FN f32v clamp(f32v a, float low, float high) {
    f32v above = a > splat(high) ? splat(high) : a;  // NaN passes, so that it can be reported
    return above < splat(low) ? splat(low) : above;
}

// Without the history and noise terms, which the caller adds in that order. `clean` says whether row.x0 is not 0.
KR_FN f32v solver_terms(const SolverRow& row, bool clean, f32v x, f32v e) {
    f32v y = fma(splat(row.model), e, mul(splat(row.sample), x));
    if (clean) {
        f32v p = fma(splat(row.x0_model), e, mul(splat(row.x0_sample), x));
        y = fma(splat(row.x0), clamp(p, -row.clip, row.clip), y);
    }
    return y;
}
