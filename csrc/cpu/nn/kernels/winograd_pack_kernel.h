// Included once per instruction set by winograd_pack.cpp.
//
// The weight of winograd_conv2d: U = G g G^T of every filter g, in double, rounded once. In training it is made anew in
// every step. One input and one block of outputs at a time: their taps are copied so that outputs lie side by side.
//
// Rows 1 and 2 of G differ in the sign of their middle column, as do rows 3 and 4: points come in pairs.

// Doubles beside the floats of vec.h: half as many lanes.
#if KR_LANES == 16
constexpr int kDoubles = 8;
typedef double f64v __attribute__((vector_size(64)));
KR_FN f64v widen(const float* from) { return (f64v)_mm512_cvtps_pd(_mm256_loadu_ps(from)); }
KR_FN void narrow(float* to, f64v a) { _mm256_storeu_ps(to, _mm512_cvtpd_ps((__m512d)a)); }
KR_FN f64v multiply_add(f64v a, f64v b, f64v c) { return (f64v)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif KR_LANES == 8
constexpr int kDoubles = 4;
typedef double f64v __attribute__((vector_size(32)));
KR_FN f64v widen(const float* from) { return (f64v)_mm256_cvtps_pd(_mm_loadu_ps(from)); }
KR_FN void narrow(float* to, f64v a) { _mm_storeu_ps(to, _mm256_cvtpd_ps((__m256d)a)); }
KR_FN f64v multiply_add(f64v a, f64v b, f64v c) { return (f64v)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
constexpr int kDoubles = 1;
typedef double f64v;
KR_FN f64v widen(const float* from) { return (double)*from; }
KR_FN void narrow(float* to, f64v a) { *to = (float)a; }
KR_FN f64v multiply_add(f64v a, f64v b, f64v c) { return a * b + c; }
#endif

constexpr int kTaps = 9, kInputs = 16, kTogether = 8;

// G g, for G [6, 3] in memory.
KR_FN void transform_taps(const double* g, const f64v* taps, f64v* out) {
    const f64v zero = {};
    out[0] = (zero + g[0]) * taps[0];
    KR_UNROLL for (int row = 1; row < 5; row += 2) {
        const double* c = g + 3 * row;
        const f64v even = multiply_add(zero + c[2], taps[2], (zero + c[0]) * taps[0]), odd = (zero + c[1]) * taps[1];
        out[row] = even + odd;
        out[row + 1] = even - odd;
    }
    out[5] = (zero + g[17]) * taps[2];
}

template <int kBlock>
static void winograd_pack_block(const WinogradPack& call, int64_t block) {
    const int64_t blocks = (call.outputs + kBlock - 1) / kBlock;
    const int64_t padded = (call.inputs + kInputs - 1) / kInputs * kInputs, step = blocks * padded * kBlock;
    const int64_t first = block * kBlock, left = call.outputs - first, live = left < kBlock ? left : kBlock;
    alignas(64) float taps[kTaps][kBlock] = {};
    alignas(64) double scale[kBlock];
    // Places lie so far apart that they may share a set of the first cache: lines of some inputs are written together.
    alignas(64) float places[36][kTogether][kBlock];
    for (int64_t o = 0; o < kBlock; ++o) scale[o] = call.scale && o < live ? call.scale[first + o] : 1.0;
    for (int64_t input = 0; input < padded; ++input) {
        const int64_t slot = input % kTogether;
        if (input >= call.inputs) std::memset(taps, 0, sizeof taps);
        const float* from = call.weight + first * call.output_step + input * call.input_step;
        for (int64_t o = 0; o < live && input < call.inputs; ++o, from += call.output_step)
            KR_UNROLL for (int t = 0; t < kTaps; ++t) taps[t][o] = from[t * call.tap_step];
        for (int o = 0; o < kBlock; o += kDoubles) {
            f64v columns[3][6], factor;
            std::memcpy(&factor, scale + o, sizeof factor);
            KR_UNROLL for (int j = 0; j < 3; ++j) {
                f64v column[3];
                KR_UNROLL for (int i = 0; i < 3; ++i) column[i] = factor * widen(&taps[3 * i + j][o]);
                transform_taps(call.transform, column, columns[j]);
            }
            KR_UNROLL for (int down = 0; down < 6; ++down) {
                const f64v row[3] = {columns[0][down], columns[1][down], columns[2][down]};
                f64v found[6];
                transform_taps(call.transform, row, found);
                KR_UNROLL for (int across = 0; across < 6; ++across)
                    narrow(&places[6 * down + across][slot][o], found[across]);
            }
        }
        if (slot < kTogether - 1) continue;
        float* to = call.packed + (block * padded + input - slot) * kBlock;
        for (int place = 0; place < 36; ++place) std::memcpy(to + place * step, places[place], sizeof places[place]);
    }
}
