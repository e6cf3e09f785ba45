// Lanes of doubles, half as many as of floats, for sums that float32 would round too early or could not hold; for the
// instruction set that foreach_isa.h is compiling. After vec.h; no include guard.
#if KR_LANES == 1
constexpr int kDoubles = 1;
typedef double f64v;
KR_FN f64v fma(f64v a, f64v b, f64v c) { return __builtin_fma(a, b, c); }
KR_FN f64v lower_half(f32v a) { return a; }
KR_FN f64v upper_half(f32v) { return 0.0; }
KR_FN double reduce_sum(f64v a) { return a; }
KR_FN f64v load_part(const double* from, int n) { return n > 0 ? *from : 0.0; }
#else
constexpr int kDoubles = KR_LANES / 2;
typedef double f64v __attribute__((vector_size(4 * KR_LANES)));
#if KR_LANES == 8
KR_FN f64v fma(f64v a, f64v b, f64v c) { return (f64v)_mm256_fmadd_pd(a, b, c); }
KR_FN f64v lower_half(f32v a) { return (f64v)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)a)); }
KR_FN f64v upper_half(f32v a) { return (f64v)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)a, 1)); }
KR_FN double reduce_sum(f64v a) { return (a[0] + a[2]) + (a[1] + a[3]); }
// The first n lanes of memory; the others are 0.
KR_FN f64v load_part(const double* from, int n) {
    const __m256i mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
    return (f64v)_mm256_maskload_pd(from, mask);
}
#else
KR_FN f64v fma(f64v a, f64v b, f64v c) { return (f64v)_mm512_fmadd_pd(a, b, c); }
KR_FN f64v lower_half(f32v a) { return (f64v)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)a)); }
KR_FN f64v upper_half(f32v a) { return (f64v)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)a, 1)); }
KR_FN double reduce_sum(f64v a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }
KR_FN f64v load_part(const double* from, int n) { return (f64v)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), from); }
#endif
#endif

KR_FN f64v load(const double* from) {
    f64v out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
KR_FN void store(double* to, f64v a) { std::memcpy(to, &a, sizeof a); }
KR_FN f64v splat(double a) { return a - f64v{}; }

// sum + a^2, lane by lane of both halves.
KR_FN void add_squares(f64v (&sum)[2], f32v a) {
    const f64v low = lower_half(a), high = upper_half(a);
    sum[0] = fma(low, low, sum[0]);
    sum[1] = fma(high, high, sum[1]);
}

KR_FN double sum_squares(const float* from, int64_t n) {
    f64v even[2] = {}, odd[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        add_squares(even, load(from + i));
        add_squares(odd, load(from + i + kLanes));
    }
    for (; i < n; i += kLanes) add_squares(even, load_part(from + i, n - i < kLanes ? (int)(n - i) : kLanes, 0.0f));
    return reduce_sum((even[0] + even[1]) + (odd[0] + odd[1]));
}
