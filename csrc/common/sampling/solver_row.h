// One element of a linear solver step, whose coefficients are those of solver_step.h; lane types and primitives as in
// philox.h. No include guard on purpose.
// Each line is one fused multiply-add, always in this order: the same bits on every device.

KR_FN f32v guided(f32v cond, f32v uncond, float guidance) { return fma(splat(guidance), cond - uncond, uncond); }

KR_FN f32v clamp(f32v a, float low, float high) {
    f32v above = a > splat(high) ? splat(high) : a;  // NaN passes, so that it can be reported
    return above < splat(low) ? splat(low) : above;
}

// The predicted clean image, clamped to [-limit, limit] and divided by it if `inverse` is 1 / limit and not 1.
KR_FN f32v solver_clean(const SolverRow& row, float limit, float inverse, f32v x, f32v e) {
    f32v p = fma(splat(row.x0_model), e, mul(splat(row.x0_sample), x));
    return mul(clamp(p, -limit, limit), splat(inverse));
}

// Without the history and noise terms, which the caller adds in that order. `clean` says whether row.x0 is not 0.
KR_FN f32v solver_terms(const SolverRow& row, bool clean, f32v x, f32v e, f32v p) {
    f32v y = fma(splat(row.model), e, mul(splat(row.sample), x));
    return clean ? fma(splat(row.x0), p, y) : y;
}

// What a later step reads as history.
KR_FN f32v solver_kept(const SolverRow& row, bool clean, f32v x, f32v e, f32v p) {
    f32v kept = fma(splat(row.keep[1]), e, mul(splat(row.keep[0]), x));
    return clean ? fma(splat(row.keep[2]), p, kept) : kept;
}
