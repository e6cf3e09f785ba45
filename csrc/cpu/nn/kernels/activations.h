// SiLU and GELU for f32v. Included after vec_math.h inside a namespace of foreach_isa.h; no include guard.

// y / (1 + e^-y). Below -87 the quotient is 0 to within 1e-36.
KR_FN f32v silu(f32v y) {
    const f32v e = vec_exp_scaled(min(splat(0.0f) - y, splat(87.0f)), splat(kLog2E));
    return y / (e + splat(1.0f));
}

// Its derivative s (1 + y (1 - s)) with s = 1 / (1 + e^-y), 1 - s as e^-y s.
KR_FN f32v silu_slope(f32v y) {
    const f32v e = vec_exp_scaled(min(splat(0.0f) - y, splat(87.0f)), splat(kLog2E));
    const f32v s = splat(1.0f) / (e + splat(1.0f));
    return s * fma(y, e * s, splat(1.0f));
}

// y Phi(y), Phi the normal distribution function. With t = |y| / sqrt(2) the smaller of Phi(y) and Phi(-y) is
// e^(-t^2 + L(t)) / 2, L(t) = ln(e^(t^2) erfc(t)): a polynomial of degree 9 on [0, 4.2], fitted so that the error of
// y Phi(y) is at most 5e-9. Beyond 4.2 L stays, where Phi is below 2e-9.
KR_FN f32v gelu(f32v y) {
    const f32v z = y * splat(0.70710678118654752f), t = max(z, splat(0.0f) - z), u = min(t, splat(4.2f));
    f32v p = splat(3.35862008e-06f);
    p = fma(p, u, splat(-5.45323687e-05f));
    p = fma(p, u, splat(0.000354591512f));
    p = fma(p, u, splat(-0.00100969368f));
    p = fma(p, u, splat(-0.000745960864f));
    p = fma(p, u, splat(0.0198981084f));
    p = fma(p, u, splat(-0.103135561f));
    p = fma(p, u, splat(0.363474588f));
    p = fma(p, u, splat(-1.12839089f));
    p = fma(p, u, splat(4.88917622e-07f));
    const f32v tail = splat(0.5f) * vec_exp(fma(splat(0.0f) - t, t, p));
    return y * (y < splat(0.0f) ? tail : splat(1.0f) - tail);
}
