// Included once per instruction set, by conv2d_grad_norms_kernel.h.
//
// Depthwise filters and small groups, of any geometry, where x and dy lie: the gradient of a few taps is summed in
// registers over a band of lines of dy. Of a depthwise filter lanes are channels, of x as of dy; else they are outputs,
// each times a number of x. A row of the kernel outside of x reads a line of zeros; a column outside is left out.

// sums += of `rows` by `taps` taps of the kernel, from row k and column l on, and `inputs` channels of x by one vector
// of outputs, of which the first `live` are.
template <int rows, int taps, int inputs, bool depthwise, bool full>
static __attribute__((noinline)) void add_taps(const ConvGradients& s, const Windows& w, int64_t k, int64_t l,
                                               int64_t input, int64_t output, int live) {
    f32v sum[rows][taps][inputs] = {};
    const auto read = [&](const float* from) { return full ? load(from) : load_part(from, live, 0.0f); };
    const auto factor = [&](const float* from) { return depthwise ? read(from) : splat(*from); };
    const int64_t apart = s.dilation_x * s.inputs, x_step = s.stride_x * s.inputs, offset = l * s.dilation_x - s.pad_x;
    // Outputs [first, last) of a line, all taps of which are inside.
    int64_t first = 0, last = s.output_width;
    while (first < last && first * s.stride_x + offset < 0) ++first;
    while (last > first && (last - 1) * s.stride_x + offset + (taps - 1) * s.dilation_x >= s.width) --last;
    const float* grad = w.grad + output;
    for (int64_t line = 0; line < w.count; ++line) {
        const float* x[rows];
        KR_UNROLL for (int r = 0; r < rows; ++r) {
            const int64_t at = w.lines[line * s.kernel_height + k + r];
            x[r] = (at < 0 ? w.zeros : w.x + at) + (depthwise ? output : input);
        }
        const auto at_the_side = [&](int64_t j) {
            const f32v value = read(grad);
            KR_UNROLL for (int t = 0; t < taps; ++t) {
                const int64_t column = j * s.stride_x + offset + t * s.dilation_x;
                if (column < 0 || column >= s.width) continue;
                KR_UNROLL for (int r = 0; r < rows; ++r) KR_UNROLL for (int i = 0; i < inputs; ++i) sum[r][t][i] =
                    fma(factor(x[r] + column * s.inputs + i), value, sum[r][t][i]);
            }
        };
        int64_t j = 0;
        for (; j < first; ++j, grad += s.outputs) at_the_side(j);
        const float* at[rows];
        KR_UNROLL for (int r = 0; r < rows; ++r) at[r] = x[r] + (j * s.stride_x + offset) * s.inputs;
        for (; j < last; ++j, grad += s.outputs) {
            const f32v value = read(grad);
            KR_UNROLL for (int r = 0; r < rows; ++r) {
                KR_UNROLL for (int t = 0; t < taps; ++t) KR_UNROLL for (int i = 0; i < inputs; ++i) sum[r][t][i] =
                    fma(factor(at[r] + t * apart + i), value, sum[r][t][i]);
                at[r] += x_step;
            }
        }
        for (; j < s.output_width; ++j, grad += s.outputs) at_the_side(j);
    }
    const int64_t all = s.kernel_height * s.kernel_width;
    KR_UNROLL for (int r = 0; r < rows; ++r) KR_UNROLL for (int t = 0; t < taps; ++t)
        KR_UNROLL for (int i = 0; i < inputs; ++i) {
        const int64_t tap = (k + r) * s.kernel_width + l + t;
        float* to = w.sums + ((input + i) * all + tap) * w.step + output;
        store(to, load(to) + sum[r][t][i]);
    }
}

// All taps of the kernel, as many at a time as the registers hold.
template <int inputs, bool depthwise, bool full>
KR_FN void add_kernel(const ConvGradients& s, const Windows& w, int64_t input, int64_t output, int live) {
    int64_t l = 0;
    const auto columns = [&](auto taps_constant, auto rows_constant) {
        constexpr int taps = decltype(taps_constant)::value, rows = decltype(rows_constant)::value;
        for (; s.kernel_width - l >= taps; l += taps) {
            int64_t k = 0;
            for (; k + rows <= s.kernel_height; k += rows)
                add_taps<rows, taps, inputs, depthwise, full>(s, w, k, l, input, output, live);
            for (; k < s.kernel_height; ++k)
                add_taps<1, taps, inputs, depthwise, full>(s, w, k, l, input, output, live);
        }
    };
    if constexpr (inputs == 1) {
        columns(std::integral_constant<int, 7>{}, std::integral_constant<int, 1>{});
        columns(std::integral_constant<int, 5>{}, std::integral_constant<int, 2>{});
    }
    columns(std::integral_constant<int, 3>{}, std::integral_constant<int, inputs == 1 ? 3 : 1>{});
    columns(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
}

template <bool depthwise>
static void add_windows(const ConvGradients& s, const Windows& w) {
    const float *next_x = w.next_x, *next_grad = w.next_grad;
    for (int64_t o = 0; o < w.outputs; o += kLanes) {
        for (int64_t c = 0; c < w.next_x_share * kLanes / 8; c += 16) __builtin_prefetch(next_x + c, 0, 2);
        for (int64_t c = 0; c < w.next_grad_share * kLanes / 8; c += 16) __builtin_prefetch(next_grad + c, 0, 2);
        next_x += w.next_x_share * kLanes / 8, next_grad += w.next_grad_share * kLanes / 8;
        const int live = w.outputs - o < kLanes ? (int)(w.outputs - o) : kLanes;
        const bool full = live == kLanes;
        int64_t i = 0;
        if constexpr (!depthwise)
            for (; i + 4 <= w.inputs; i += 4)
                full ? add_kernel<4, false, true>(s, w, i, o, live) : add_kernel<4, false, false>(s, w, i, o, live);
        for (; i < w.inputs; ++i)
            full ? add_kernel<1, depthwise, true>(s, w, i, o, live) : add_kernel<1, depthwise, false>(s, w, i, o, live);
    }
}
