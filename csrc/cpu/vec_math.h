// exp and log for f32v, about 1 ulp. Included after vec.h inside a namespace of foreach_isa.h; no include guard.

// e^a for a <= 88; 0 below -87.3; NaN passes. Cephes' expf with fused multiply-adds.
KR_FN f32v vec_exp(f32v a) {
    const f32v low = splat(-87.3365478515625f);
    f32v x = a < low ? low : a;
    f32v n = fma(x, splat(1.44269504088896341f), splat(12582912.0f)) - splat(12582912.0f);
    f32v r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    f32v p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    // n is an integer in [-126, 127]: adding 127.5 * 2^23 style constants puts it into the exponent field.
    i32v exponent = as_i(n + splat(12582912.0f + 127.0f)) << 23;
    f32v out = p * as_f(exponent);
    return a < low ? splat(0.0f) : out;
}

// ln a for normal a > 0. Cephes' logf.
KR_FN f32v vec_log(f32v a) {
    i32v bits = as_i(a) - as_i(splat(0.70710677f));
    f32v e = to_float_i(bits >> 23);
    f32v f = as_f((bits & 0x7FFFFF) + as_i(splat(0.70710677f))) - splat(1.0f);
    f32v p = splat(7.0376836292e-2f);
    p = fma(p, f, splat(-1.1514610310e-1f));
    p = fma(p, f, splat(1.1676998740e-1f));
    p = fma(p, f, splat(-1.2420140846e-1f));
    p = fma(p, f, splat(1.4249322787e-1f));
    p = fma(p, f, splat(-1.6668057665e-1f));
    p = fma(p, f, splat(2.0000714765e-1f));
    p = fma(p, f, splat(-2.4999993993e-1f));
    p = fma(p, f, splat(3.3333331174e-1f));
    f32v z = f * f;
    f32v tail = fma(e, splat(-2.12194440e-4f), fma(p * f, z, z * splat(-0.5f)));
    return fma(e, splat(0.693359375f), f + tail);
}
