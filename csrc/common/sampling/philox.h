// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) and Box-Muller normals.
//
// One text for every device. The includer provides, in the namespace it includes this file into, the lane types
// f32v, u32v, i32v (float/uint32_t/int32_t or SIMD vectors of them), KR_FN, KR_UNROLL and the primitives
//   fma(a,b,c)  sqrt(a)  mul(a,b)  splat(float)  splat_u(uint32_t)  mulhilo(a, constant, hi, lo)
//   to_float_u(u32v)  to_float_i(i32v)  as_i(f32v)  as_f(i32v)  log_polynomial(a)
// each of which rounds as IEEE 754 says. No product is ever left next to a sum for a compiler to contract: that is
// what makes the bits equal on scalar C++, AVX2, AVX-512, CUDA and Triton. There is no include guard on purpose.

struct Words {
    u32v w[4];
};

// counter = (element / 4, stream, id low, id high), key = seed. Ten rounds; the key is bumped between rounds.
KR_FN Words philox(u32v c0, u32v c1, u32v c2, u32v c3, uint32_t k0, uint32_t k1) {
    KR_UNROLL
    for (int round = 0; round < 10; ++round) {
        u32v hi0, lo0, hi1, lo1;
        mulhilo(c0, 0xD2511F53u, hi0, lo0);
        mulhilo(c2, 0xCD9E8D57u, hi1, lo1);
        c0 = hi1 ^ c1 ^ splat_u(k0);
        c2 = hi0 ^ c3 ^ splat_u(k1);
        c1 = lo1;
        c3 = lo0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    Words out = {{c0, c1, c2, c3}};
    return out;
}

// sqrt(-2 ln u) with u = (x + 1/2) / 2^32, so that the tail reaches 6.7 sigma. See log_polynomial.h.
KR_FN f32v normal_radius(u32v x) {
    f32v u = fma(to_float_u(x), splat(0x1p-32f), splat(0x1p-33f));
    i32v bits = as_i(u) - as_i(splat(0.70710677f));  // mantissa range [sqrt(1/2), sqrt(2)) around one
    f32v e = to_float_i(bits >> 23);
    f32v m = as_f((bits & 0x7FFFFF) + as_i(splat(0.70710677f)));
    f32v f = m - splat(1.0f);
    f32v z = mul(f, f);
    f32v log_m = fma(z, fma(log_polynomial(f), f, splat(-0.5f)), f);
    f32v log_u = fma(e, splat(0.693147180f), log_m);
    return sqrt(mul(log_u, splat(-2.0f)));
}

// cos and sin of 2 pi x / 2^32: exact reduction to an eighth of a turn in integers, then Cephes' minimax polynomials.
KR_FN void normal_angle(u32v x, f32v& c, f32v& s) {
    u32v turn = x + splat_u(0x20000000u);  // the top two bits are the quarter, the others the position in it
    f32v t = mul(to_float_i((i32v)((turn & splat_u(0x3FFFFFFFu)) - splat_u(0x20000000u))),
                 splat(1.46291807926715969e-9f));  // pi / 2^31
    f32v z = mul(t, t);
    f32v ps = fma(fma(splat(-1.9515295891e-4f), z, splat(8.3321608736e-3f)), z, splat(-1.6666654611e-1f));
    f32v sine = fma(mul(ps, z), t, t);
    f32v pc = fma(fma(splat(2.443315711809948e-5f), z, splat(-1.388731625493765e-3f)), z, splat(4.166664568298827e-2f));
    f32v cosine = fma(mul(pc, z), z, fma(splat(-0.5f), z, splat(1.0f)));
    u32v low_bit = turn << 1;
    i32v exchange = (as_i(cosine) ^ as_i(sine)) & ((i32v)low_bit >> 31);                  // in odd quarters
    c = as_f(as_i(cosine) ^ exchange ^ (i32v)((turn ^ low_bit) & splat_u(0x80000000u)));  // negative in 1 and 2
    s = as_f(as_i(sine) ^ exchange ^ (i32v)(turn & splat_u(0x80000000u)));                // negative in 2 and 3
}

KR_FN void normal_pair(f32v radius, u32v angle, f32v out[2]) {
    f32v c, s;
    normal_angle(angle, c, s);
    out[0] = mul(radius, c);
    out[1] = mul(radius, s);
}

// The four normals of one counter: words (0, 1) make the first pair, words (2, 3) the second.
KR_FN void philox_normal4(u32v group, u32v stream, u32v id_lo, u32v id_hi, uint32_t k0, uint32_t k1, f32v out[4]) {
    Words words = philox(group, stream, id_lo, id_hi, k0, k1);
    KR_UNROLL
    for (int pair = 0; pair < 2; ++pair)
        normal_pair(normal_radius(words.w[2 * pair]), words.w[2 * pair + 1], out + 2 * pair);
}
