// Included once per instruction set by conv2d_grad_norms.cpp.
//
// The Gram form: |dw|^2 = sum over outputs s, t of (dy_s . dy_t) sum over taps (x_{s + tap} . x_{t + tap}). The
// products of pixels of x are the same for all taps, which only look them up at other places: so there are n^2 C / 2 of
// them and not n^2 C k^2. Terms of the sum cancel, so all of it is in double, in which products of floats are exact.
#include "cpu/simd/doubles.h"

#include "cpu/privacy/conv2d_windows_kernel.h"

#if KR_LANES == 16
constexpr int kGramRows = 8;
#else
constexpr int kGramRows = 4;
#endif
constexpr int kGramVectors = 3;

// to[c][p] = pixel p of x, whose floats begin at x[at[p]]; zeros up to `step`.
static void gram_columns(const float* x, const int64_t* at, int64_t pixels, int64_t channels, double* to,
                         int64_t step) {
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) {
        const float *a = x + at[p], *b = x + at[p + 1], *c = x + at[p + 2], *d = x + at[p + 3];
        double* out = to + p;
        for (int64_t i = 0; i < channels; ++i, out += step) out[0] = a[i], out[1] = b[i], out[2] = c[i], out[3] = d[i];
    }
    for (; p < step; ++p)
        for (int64_t i = 0; i < channels; ++i) to[i * step + p] = p < pixels ? x[at[p] + i] : 0.0;
}

template <int vectors>
static __attribute__((noinline)) void gram_tile(const double* columns, int64_t channels, int64_t step, int64_t row,
                                                int64_t column, double* to) {
    f64v sum[kGramRows][vectors] = {};
    const double *high = columns + row, *wide = columns + column;
    for (int64_t c = 0; c < channels; ++c, high += step, wide += step) {
        f64v value[vectors];
        KR_UNROLL for (int v = 0; v < vectors; ++v) value[v] = load(wide + v * kDoubles);
        KR_UNROLL for (int r = 0; r < kGramRows; ++r) {
            const f64v factor = splat(high[r]);
            KR_UNROLL for (int v = 0; v < vectors; ++v) sum[r][v] = fma(factor, value[v], sum[r][v]);
        }
    }
    KR_UNROLL for (int r = 0; r < kGramRows; ++r) KR_UNROLL for (int v = 0; v < vectors; ++v)
        store(to + (row + r) * step + column + v * kDoubles, sum[r][v]);
}

// to[p][q] = pixel p . pixel q for q >= p; what lies before is not all written.
static void gram_matrix(const double* columns, int64_t pixels, int64_t channels, int64_t step, double* to) {
    for (int64_t row = 0; row < pixels; row += kGramRows)
        for (int64_t column = row / kDoubles * kDoubles; column < pixels;) {
            const int64_t left = (pixels - column + kDoubles - 1) / kDoubles;
            if (left >= 3)
                gram_tile<3>(columns, channels, step, row, column, to);
            else if (left == 2)
                gram_tile<2>(columns, channels, step, row, column, to);
            else
                gram_tile<1>(columns, channels, step, row, column, to);
            column += (left < 3 ? left : 3) * kDoubles;
        }
}

KR_FN f64v dot(const double* a, const double* b, int64_t n, f64v sum) {
    int64_t i = 0;
    for (; i + kDoubles <= n; i += kDoubles) sum = fma(load(a + i), load(b + i), sum);
    if (i < n) sum = fma(load_part(a + i, (int)(n - i)), load_part(b + i, (int)(n - i)), sum);
    return sum;
}

// The sum over pairs of outputs, of one tap: `pixels` of x at the places that the tap moves outputs to.
static double gram_tap(const GramTap& tap, const double* pixels, int64_t pixel_step, const double* outputs,
                       int64_t output_step) {
    f64v pairs = {};
    double same = 0.0;
    for (int64_t image = 0; image < tap.images; ++image)
        for (int64_t i = tap.first_row; i < tap.last_row; ++i)
            for (int64_t j = tap.first_column; j < tap.last_column; ++j) {
                const int64_t at = (image * tap.height + i + tap.down) * tap.width + j + tap.across;
                const int64_t to = (image * tap.output_height + i) * tap.output_width + j;
                const double *x = pixels + at * pixel_step, *y = outputs + to * output_step;
                same += x[at] * y[to];
                f64v sum = dot(x + at, y + to, tap.last_column - j, f64v{});
                int64_t line = i + 1;
                for (int64_t other = image; other < tap.images; ++other, line = tap.first_row)
                    for (; line < tap.last_row; ++line) {
                        const int64_t column = tap.first_column;
                        sum = dot(x + (other * tap.height + line + tap.down) * tap.width + column + tap.across,
                                  y + (other * tap.output_height + line) * tap.output_width + column,
                                  tap.last_column - column, sum);
                    }
                pairs = pairs + sum;
            }
    return 2.0 * reduce_sum(pairs) - same;
}

// to[c] = the sum of `rows` rows.
static void sum_outputs(const float* from, int64_t rows, int64_t channels, float* to) {
    for (int64_t c = 0; c < channels; c += kLanes) {
        const int live = channels - c < kLanes ? (int)(channels - c) : kLanes;
        f32v sum[4] = {};
        const float* row = from + c;
        for (int64_t r = 0; r < rows; ++r, row += channels) sum[r % 4] = sum[r % 4] + load_part(row, live, 0.0f);
        store_part(to + c, (sum[0] + sum[1]) + (sum[2] + sum[3]), live);
    }
}

static double squares(const float* from, int64_t n) { return sum_squares(from, n); }
