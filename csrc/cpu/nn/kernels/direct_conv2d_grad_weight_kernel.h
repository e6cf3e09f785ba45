// Included once per instruction set, by direct_conv2d_kernel.h.
//
// The gradient of the filters, dw[tap][i][o] = sum over pixels x[pixel moved by tap][i] dy[pixel][o]. A tap has the
// pixels of dy whose place in x is inside: lines of them, so that nothing is spent on borders. Inputs by outputs of one
// tap are summed in registers over all lines of a block of pixels. Where inputs are no multiple of four (one or three
// colours), x is padded, and the taps of a line by inputs are the inputs of a product.

// Inputs and vectors of outputs that the registers hold, and what inputs are shared out by.
constexpr int kHigh = KR_LANES == 16 ? 12 : KR_LANES == 8 ? 6 : 4, kWide = 2, kUnit = KR_LANES == 8 ? 2 : 4;

// Memory that the next block reads, asked for bit by bit while this one is summed.
struct Ahead {
    const float *x, *grad;
    int64_t x_step, grad_step;  // floats at a time
};
KR_FN void prefetch_some(Ahead& ahead) {
    for (int64_t c = 0; c < ahead.x_step; c += 16) __builtin_prefetch(ahead.x + c, 0, 2);
    for (int64_t c = 0; c < ahead.grad_step; c += 16) __builtin_prefetch(ahead.grad + c, 0, 2);
    ahead.x += ahead.x_step, ahead.grad += ahead.grad_step;
}

// Of a block of lines [begin, end) of dy that is summed by `calls` products.
KR_FN Ahead ahead_of(const DirectConvShape& s, const float* x, const float* grad, int64_t begin, int64_t end,
                     int64_t calls) {
    const int64_t x_line = s.width * s.inputs, grad_line = s.output_width * s.outputs;
    const int64_t y = end / s.output_height * s.height + end % s.output_height * s.stride_y;
    return {x + y * x_line, grad + end * grad_line, (end - begin) * s.stride_y * x_line / calls,
            (end - begin) * grad_line / calls};
}

// Lines of pixels of x and dy.
struct Lines {
    const float *x, *grad;          // to which the offsets are added
    const int64_t *x_at, *grad_at;  // of each line
    int64_t count, pixels, x_step, grad_step;
};

// sums[input][output] = or += ..., of `high` inputs and `wide` vectors of outputs; the last vector has `live` lanes.
template <int high, int wide, bool full>
static KR_APART void sum_pixels(const Lines& lines, int64_t input, int64_t output, int live, float* sums, int64_t step,
                                bool add) {
    f32v sum[high][wide] = {};
    const int64_t x_step = lines.x_step, grad_step = lines.grad_step;
    for (int64_t line = 0; line < lines.count; ++line) {
        const float* x = lines.x + lines.x_at[line] + input;
        const float* grad = lines.grad + lines.grad_at[line] + output;
        for (int64_t j = 0; j < lines.pixels; ++j, x += x_step, grad += grad_step) {
            f32v value[wide];
            KR_UNROLL for (int v = 0; v < wide; ++v) value[v] =
                full || v + 1 < wide ? load(grad + v * kLanes) : load_part(grad + v * kLanes, live, 0.0f);
            KR_UNROLL for (int r = 0; r < high; ++r) {
                const f32v factor = splat(x[r]);
                KR_UNROLL for (int v = 0; v < wide; ++v) sum[r][v] = fma(factor, value[v], sum[r][v]);
            }
        }
    }
    KR_UNROLL for (int r = 0; r < high; ++r) KR_UNROLL for (int v = 0; v < wide; ++v) {
        float* to = sums + r * step + v * kLanes;
        store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <int high>
KR_FN void sum_inputs(int count, const Lines& lines, int64_t input, int64_t output, int vectors, int live, float* sums,
                      int64_t step, bool add) {
    if constexpr (high > kUnit) {
        if (count < high) return sum_inputs<high - kUnit>(count, lines, input, output, vectors, live, sums, step, add);
    }
    if (vectors == kWide && live == kLanes)
        sum_pixels<high, kWide, true>(lines, input, output, live, sums, step, add);
    else if (vectors == kWide)
        sum_pixels<high, kWide, false>(lines, input, output, live, sums, step, add);
    else if (live == kLanes)
        sum_pixels<high, 1, true>(lines, input, output, live, sums, step, add);
    else
        sum_pixels<high, 1, false>(lines, input, output, live, sums, step, add);
}

// How many products sum_tap takes.
KR_FN int64_t products_of(int64_t inputs, int64_t outputs) {
    return ((inputs + kHigh - 1) / kHigh) * ((outputs + kWide * kLanes - 1) / (kWide * kLanes));
}

// sums [inputs][step] of `inputs` (a multiple of four) by `outputs`.
static void sum_tap(const Lines& lines, int64_t inputs, int64_t outputs, float* sums, int64_t step, bool add,
                    Ahead& ahead) {
    const int64_t tiles = (inputs + kHigh - 1) / kHigh, units = inputs / kUnit;
    for (int64_t o = 0; o < outputs;) {
        const int64_t left = outputs - o;
        const int vectors = left > kLanes ? kWide : 1;
        const int64_t last = left - (vectors - 1) * kLanes;
        const int live = last < kLanes ? (int)last : kLanes;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t i = units * t / tiles * kUnit, count = units * (t + 1) / tiles * kUnit - i;
            sum_inputs<kHigh>((int)count, lines, i, o, vectors, live, sums + i * step + o, step, add);
            prefetch_some(ahead);
        }
        o += vectors * kLanes;
    }
}

// Lines [begin, end) of dy, counted over all images, are added to sums [taps][inputs][outputs] of taps [from, to).
static void direct_grad_lines(const DirectConvShape& s, const float* x, const float* grad, int64_t begin, int64_t end,
                              int64_t from, int64_t to, float* sums, bool add, int64_t* offsets) {
    const int64_t step = direct_columns(s), x_line = s.width * s.inputs, grad_line = s.output_width * s.outputs;
    int64_t *x_at = offsets, *grad_at = offsets + (end - begin);
    Ahead ahead = ahead_of(s, x, grad, begin, end, (to - from) * products_of(s.inputs, s.outputs));
    for (int64_t tap = from; tap < to; ++tap) {
        const int64_t k = tap / s.kernel_width, l = tap % s.kernel_width;
        int64_t first = 0, last = s.output_width, count = 0;
        while (first < last && first * s.stride_x - s.pad_x + l < 0) ++first;
        while (last > first && (last - 1) * s.stride_x - s.pad_x + l >= s.width) --last;
        int64_t n = begin / s.output_height, i = begin % s.output_height;
        for (int64_t line = begin; line < end; ++line) {
            const int64_t y = i * s.stride_y - s.pad_y + k;
            if (y >= 0 && y < s.height) {
                x_at[count] = (n * s.height + y) * x_line;
                grad_at[count++] = line * grad_line;
            }
            if (++i == s.output_height) i = 0, ++n;
        }
        if (first == last) count = first = 0;
        const int64_t start = count ? first * s.stride_x - s.pad_x + l : 0;
        const Lines lines = {x + start * s.inputs, grad + first * s.outputs, x_at,     grad_at, count,
                             last - first,         s.stride_x * s.inputs,    s.outputs};
        sum_tap(lines, s.inputs, s.outputs, sums + tap * s.inputs * step, step, add, ahead);
    }
}

// Few inputs and 3x3 taps: `length` numbers of each of three lines of padded x, `line` floats apart. All taps at once;
// `rows` lie between the sums of two lines.
template <int length, int wide, bool full>
static KR_APART void sum_three_lines(const Lines& lines, int64_t line, int64_t rows, int64_t output, int live,
                                     float* sums, int64_t step, bool add) {
    f32v sum[3][length][wide] = {};
    const int64_t x_step = lines.x_step, grad_step = lines.grad_step;
    for (int64_t number = 0; number < lines.count; ++number) {
        const float *x = lines.x + lines.x_at[number], *below = x + line, *last = below + line;
        const float* grad = lines.grad + lines.grad_at[number] + output;
        for (int64_t j = 0; j < lines.pixels; ++j, x += x_step, below += x_step, last += x_step, grad += grad_step) {
            f32v value[wide];
            KR_UNROLL for (int v = 0; v < wide; ++v) value[v] =
                full || v + 1 < wide ? load(grad + v * kLanes) : load_part(grad + v * kLanes, live, 0.0f);
            KR_UNROLL for (int r = 0; r < length; ++r) KR_UNROLL for (int v = 0; v < wide; ++v) {
                sum[0][r][v] = fma(splat(x[r]), value[v], sum[0][r][v]);
                sum[1][r][v] = fma(splat(below[r]), value[v], sum[1][r][v]);
                sum[2][r][v] = fma(splat(last[r]), value[v], sum[2][r][v]);
            }
        }
    }
    KR_UNROLL for (int k = 0; k < 3; ++k) KR_UNROLL for (int r = 0; r < length; ++r)
        KR_UNROLL for (int v = 0; v < wide; ++v) {
        float* to = sums + (k * rows + r) * step + v * kLanes;
        store(to, add ? load(to) + sum[k][r][v] : sum[k][r][v]);
    }
}

template <int length, int wide>
static void sum_three(const Lines& lines, int64_t line, int64_t rows, int64_t outputs, float* sums, int64_t step,
                      bool add, Ahead ahead) {
    for (int64_t o = 0; o < outputs; prefetch_some(ahead)) {
        const int64_t left = outputs - o;
        if (left >= wide * kLanes) {
            sum_three_lines<length, wide, true>(lines, line, rows, o, kLanes, sums + o, step, add);
            o += wide * kLanes;
        } else {
            const int live = left < kLanes ? (int)left : kLanes;
            sum_three_lines<length, 1, false>(lines, line, rows, o, live, sums + o, step, add);
            o += kLanes;
        }
    }
}

// The same for few inputs: x is padded with zeros, so that taps of a line are numbers side by side, which are the
// inputs of a product. sums [kernel height][direct_rows][columns].
static void direct_grad_few(const DirectConvShape& s, const float* x, const float* grad, int64_t begin, int64_t end,
                            float* sums, bool add, float* scratch) {
    const int64_t lines = end - begin, line = direct_padded_line(s), length = s.kernel_width * s.inputs;
    const int64_t rows = direct_rows(s), step = direct_columns(s), inside = s.width * s.inputs,
                  left = s.pad_x * s.inputs;
    int64_t *x_at = reinterpret_cast<int64_t*>(scratch), *grad_at = x_at + lines;
    float* padded = scratch + 4 * lines;
    int64_t filled = 0, next = 0, image = -1;  // lines of `padded`; the next line of x and its image
    for (int64_t number = begin; number < end; ++number) {
        const int64_t n = number / s.output_height, top = number % s.output_height * s.stride_y - s.pad_y;
        if (n != image || next < top) image = n, next = top;
        for (; next < top + s.kernel_height; ++next, ++filled) {
            float* to = padded + filled * line;
            for (int64_t c = 0; c < line; c += kLanes) store(to + c, splat(0.0f));
            if (next < 0 || next >= s.height) continue;
            const float* from = x + (n * s.height + next) * inside;
            for (int64_t c = 0; c < inside; c += kLanes) {
                const int live = inside - c < kLanes ? (int)(inside - c) : kLanes;
                store_part(to + left + c, load_part(from + c, live, 0.0f), live);
            }
        }
        x_at[number - begin] = (filled - s.kernel_height) * line;
        grad_at[number - begin] = number * s.output_width * s.outputs;
    }
    Lines all = {padded, grad, x_at, grad_at, lines, s.output_width, s.stride_x * s.inputs, s.outputs};
    constexpr int wide = KR_LANES == 16 ? 2 : 1;
    const auto ahead_by = [&](int64_t calls) { return ahead_of(s, x, grad, begin, end, calls); };
    if (s.kernel_height == 3 && length == 3)
        return sum_three<3, wide>(all, line, rows, s.outputs, sums, step, add, ahead_by((s.outputs + 31) / 32));
    if (s.kernel_height == 3 && length == 9 && KR_LANES == 16)
        return sum_three<9, 1>(all, line, rows, s.outputs, sums, step, add, ahead_by((s.outputs + 15) / 16));
    Ahead ahead = ahead_by(s.kernel_height * products_of(rows, s.outputs));
    for (int64_t k = 0; k < s.kernel_height; ++k, all.x += line)
        sum_tap(all, rows, s.outputs, sums + k * rows * step, step, add, ahead);
}

// bias[output] += or = the sum of dy over lines [begin, end).
static void direct_grad_bias(const DirectConvShape& s, const float* grad, int64_t begin, int64_t end, float* bias,
                             bool add) {
    const int64_t pixels = (end - begin) * s.output_width;
    for (int64_t o = 0; o < s.outputs; o += kLanes) {
        const int live = s.outputs - o < kLanes ? (int)(s.outputs - o) : kLanes;
        const float* from = grad + begin * s.output_width * s.outputs + o;
        f32v sum[4] = {};
        int64_t j = 0;
        for (; j + 4 <= pixels; j += 4, from += 4 * s.outputs)
            KR_UNROLL for (int k = 0; k < 4; ++k) sum[k] = sum[k] + load_part(from + k * s.outputs, live, 0.0f);
        for (; j < pixels; ++j, from += s.outputs) sum[0] = sum[0] + load_part(from, live, 0.0f);
        const f32v all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        store(bias + o, add ? load(bias + o) + all : all);
    }
}
