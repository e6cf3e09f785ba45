// exp and log for f32v, about 1 ulp. Included after vec.h inside a namespace of foreach_isa.h; no include guard.

// e^a for a <= 88; 0 far below -87; NaN passes. Cephes' range reduction, then the polynomial
// of degree 6 whose largest relative error on [-ln 2 / 2, ln 2 / 2] is least, 3e-9.
KR_FN f32v vec_exp(f32v a) {
    // max gives its second operand where either is NaN.
    const f32v low = splat(KR_LANES == 16 ? -150.0f : -87.3365478515625f), x = max(low, a);
    f32v n = fma(x, splat(kLog2E), splat(12582912.0f)) - splat(12582912.0f);
    f32v r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    f32v p = splat(1.3814527774e-3f);
    p = fma(p, r, splat(8.3687445126e-3f));
    p = fma(p, r, splat(4.1668392718e-2f));
    p = fma(p, r, splat(1.6666521132e-1f));
    p = fma(p, r, splat(4.9999994040e-1f));
    p = fma(p, r * r, r + splat(1.0f));
#if KR_LANES == 16
    return (f32v)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // n is an integer in [-126, 127]: adding 127.5 * 2^23 style constants puts it into the exponent field.
    i32v exponent = (i32v)((u32v)as_i(n + splat(12582912.0f + 127.0f)) << 23);
    f32v out = p * as_f(exponent);
    return a < low ? splat(0.0f) : out;
#endif
}

// 2^(n + r) for an integer n in [-200, 127] (from -126 on without AVX-512) and r in [-0.5, 0.5]. Degree 6, largest
// relative error 2e-9.
KR_FN f32v exp2_of_parts(f32v n, f32v r) {
    f32v p = splat(1.535334741e-04f);
    p = fma(p, r, splat(1.339888899e-03f));
    p = fma(p, r, splat(9.618437849e-03f));
    p = fma(p, r, splat(5.550332367e-02f));
    p = fma(p, r, splat(2.402264774e-01f));
    p = fma(p, r, splat(6.931471825e-01f));
    p = fma(p, r, splat(1.0f));
#if KR_LANES == 16
    return (f32v)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * as_f((i32v)((u32v)as_i(n + splat(12582912.0f + 127.0f)) << 23));
#endif
}

constexpr float kLeastExponent = KR_LANES == 16 ? -200.0f : -126.0f;

#if KR_LANES == 16
KR_FN f32v round_to_integer(f32v a) {
    return (f32v)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
KR_FN f32v round_to_integer(f32v a) { return a + splat(12582912.0f) - splat(12582912.0f); }
#endif

// 2^a for a <= 127; 0 far below 2^-126; NaN passes.
KR_FN f32v vec_exp2(f32v a) {
    const f32v low = splat(kLeastExponent), x = max(low, a), n = round_to_integer(x);
    const f32v out = exp2_of_parts(n, x - n);
    return KR_LANES == 16 ? out : a < low ? splat(0.0f) : out;
}

// 2^(a b) for a <= 0 and b > 0, with a b as if exact; 0 far below 2^-126; NaN passes. With b = log2(e) / T this is
// e^(a / T) for fewer operations than vec_exp needs.
KR_FN f32v vec_exp_scaled(f32v a, f32v b) {
    const f32v low = splat(kLeastExponent) / b, x = max(low, a);
#if KR_LANES == 16
    const f32v n = round_to_integer(x * b);
#else
    const f32v n = fma(x, b, splat(12582912.0f)) - splat(12582912.0f);
#endif
    const f32v out = exp2_of_parts(n, fma(x, b, -n));
    return KR_LANES == 16 ? out : a < low ? splat(0.0f) : out;
}

// ln a for normal a > 0, and a itself where it is inf or NaN: a row gone wrong must not look like a number. Cephes'
// logf.
KR_FN f32v vec_log(f32v a) {
    i32v bits = as_i(a) - as_i(splat(0.70710677f));
    f32v e = to_float_i(bits >> 23);
    f32v f = as_f((bits & 0x7FFFFF) + as_i(splat(0.70710677f))) - splat(1.0f);
    f32v z = f * f;
    f32v tail = fma(e, splat(-2.12194440e-4f), fma(log_polynomial(f) * f, z, z * splat(-0.5f)));
    return a - a == splat(0.0f) ? fma(e, splat(0.693359375f), f + tail) : a;
}
