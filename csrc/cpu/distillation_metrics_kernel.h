// Included once per instruction set by distillation_metrics.cpp: a vector holds kLanes classes of one row.
#include "cpu/softmax_row.h"

struct Top {
    float value;
    int64_t index;  // the lowest, as torch.argmax
};

static Top row_top(const float* a, int64_t n) {
    const float top = row_max(a, n);
    for (int64_t i = 0; i < n; ++i)
        if (a[i] == top) return {top, i};
    return {top, -1};  // NaN
}

// work: 4 * classes floats.
static void metrics_row(const DistillationMetrics& call, int64_t row, float* work) {
    const int64_t n = call.classes;
    const float T = call.temperature, minus_inf = -__builtin_inff();
    float *es = work, *et = work + n;
    const float* s = to_float_row(call.input, call.input_dtype, row * call.input_stride, n, work + 2 * n);
    const float* t = to_float_row(call.target, call.target_dtype, row * call.target_stride, n, work + 3 * n);
    const Top top_s = row_top(s, n), top_t = row_top(t, n);
    const RowSums sums_s = exponentials<kNoPower>(s, n, top_s.value, T, true, false, es);
    const RowSums sums_t = exponentials<kNoPower>(t, n, top_t.value, T, true, false, et);
    const f32v scale_s = splat(1.0f / (float)sums_s.tempered), scale_t = splat(1.0f / (float)sums_t.tempered);
    const f32v shift = splat((float)__builtin_log(sums_t.tempered / sums_s.tempered)), inverse_t = splat(1.0f / T);
    double kl = 0, weighted = 0;
    for (int64_t start = 0; start < n; start += kBlock) {
        f32v block = splat(0.0f), block_w = splat(0.0f);
        KR_EACH_VECTOR(block_length(n, start)) {
            const f32v c_s = take(s + start + i, left, minus_inf) - splat(top_s.value);
            const f32v c_t = take(t + start + i, left, minus_inf) - splat(top_t.value);
            const f32v q = take(es + start + i, left, 0.0f) * scale_s, p = take(et + start + i, left, 0.0f) * scale_t;
            block = block + kl_term(p, q, (c_t - c_s) * inverse_t - shift);
            const f32v e = vec_exp(c_t);
            block_w = block_w + (e == splat(0.0f) ? splat(0.0f) : e * c_t);
        }
        kl += reduce_sum(block), weighted += reduce_sum(block_w);
    }
    call.kl[row] = (float)((double)T * T * kl);
    call.teacher_confidence[row] = (float)(1.0 / sums_t.plain);
    call.teacher_entropy[row] = (float)(__builtin_log(sums_t.plain) - weighted / sums_t.plain);
    call.agreement[row] = top_s.index == top_t.index;
    if (!call.labels) return;
    const int64_t label = call.labels[row];
    const bool counts = label >= 0 && label < n;
    call.cross_entropy[row] = counts ? (float)(__builtin_log(sums_s.plain) - ((double)s[label] - top_s.value)) : 0.0f;
    call.student_correct[row] = top_s.index == label, call.teacher_correct[row] = top_t.index == label;
}
#undef KR_EACH_VECTOR
