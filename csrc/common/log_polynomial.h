// p with ln(1 + f) = f + f^2 (p f - 1 / 2) for f in [sqrt(1/2) - 1, sqrt(2) - 1], by Cephes' logf. Included by the lane
// primitives of each device (cpu/simd/vec.h, cuda/device/lane.h), so there is no include guard on purpose.
KR_FN f32v log_polynomial(f32v f) {
    f32v p = splat(7.0376836292e-2f);
    p = fma(p, f, splat(-1.1514610310e-1f));
    p = fma(p, f, splat(1.1676998740e-1f));
    p = fma(p, f, splat(-1.2420140846e-1f));
    p = fma(p, f, splat(1.4249322787e-1f));
    p = fma(p, f, splat(-1.6668057665e-1f));
    p = fma(p, f, splat(2.0000714765e-1f));
    p = fma(p, f, splat(-2.4999993993e-1f));
    return fma(p, f, splat(3.3333331174e-1f));
}
