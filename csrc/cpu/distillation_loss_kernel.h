// Included once per instruction set by distillation_loss.cpp.
//
// Two layouts. Up to kLaneClasses classes a vector holds the same class of kLanes rows: no reductions across lanes and
// no tails. Above that a vector holds kLanes classes of one row, and the row stays in L1 between its passes.
#include "cpu/vec_math.h"

static const float* to_float_row(const void* base, Dtype dtype, int64_t offset, int64_t n, float* scratch) {
    if (dtype == Dtype::f32) return static_cast<const float*>(base) + offset;
    const uint16_t* from = static_cast<const uint16_t*>(base) + offset;
    if (dtype == Dtype::bf16) {
        for (int64_t i = 0; i < n; ++i) scratch[i] = bf16_to_float(from[i]);
    } else {
        int64_t i = 0;
#if KR_LANES == 8
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(scratch + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#elif KR_LANES == 16
        for (; i + 16 <= n; i += 16)
            _mm512_storeu_ps(scratch + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#endif
        for (; i < n; ++i) scratch[i] = half_to_float(from[i]);
    }
    return scratch;
}

static void from_float_row(const float* from, Dtype dtype, void* base, int64_t offset, int64_t n) {
    uint16_t* to = static_cast<uint16_t*>(base) + offset;
    if (dtype == Dtype::bf16)
        for (int64_t i = 0; i < n; ++i) to[i] = float_to_bf16(from[i]);
    else
        for (int64_t i = 0; i < n; ++i) to[i] = float_to_half(from[i]);
}

// p (d + expm1(-d)) with d = ln p - ln q: never negative, no cancellation near d = 0, q alone where p = 0.
KR_FN f32v kl_term(f32v p, f32v q, f32v d) {
    f32v poly = splat(1.0f / 40320);
    poly = fma(poly, d, splat(-1.0f / 5040));
    poly = fma(poly, d, splat(1.0f / 720));
    poly = fma(poly, d, splat(-1.0f / 120));
    poly = fma(poly, d, splat(1.0f / 24));
    poly = fma(poly, d, splat(-1.0f / 6));
    poly = fma(poly, d, splat(0.5f));
    f32v near = p * (d * d) * poly;
    f32v far = fma(p, d, q - p);
    far = far < splat(0.0f) ? splat(0.0f) : far;
    f32v size = d < splat(0.0f) ? -d : d;
    f32v term = size < splat(0.25f) ? near : far;
    return p == splat(0.0f) ? q : term;
}

// e^(s - m) from e^((s - m) / T): one or two multiplications where T is 1, 2 or 4.
KR_FN f32v untempered(f32v centred, f32v tempered, float temperature) {
    if (temperature == 1.0f) return tempered;
    f32v squared = tempered * tempered;
    if (temperature == 2.0f) return squared;
    if (temperature == 4.0f) return squared * squared;
    return vec_exp(centred);
}

// ---------------------------------------------------------------- one class a vector, kLanes rows

constexpr int kLaneClasses = 32;

struct LaneBlock {
    f32v s[kLaneClasses], t[kLaneClasses];
};

static void load_lanes(const DistillationLoss& call, int64_t row, int count, LaneBlock& block) {
    const int classes = (int)call.classes;
    float scratch[kLaneClasses];
    float* s = reinterpret_cast<float*>(block.s);
    float* t = reinterpret_cast<float*>(block.t);
    for (int r = 0; r < kLanes; ++r) {
        const int64_t at = row + (r < count ? r : count - 1);
        const float* from = to_float_row(call.input, call.input_dtype, at * call.input_stride, classes, scratch);
        for (int j = 0; j < classes; ++j) s[j * kLanes + r] = from[j];
        from = to_float_row(call.target, call.target_dtype, at * call.target_stride, classes, scratch);
        for (int j = 0; j < classes; ++j) t[j * kLanes + r] = from[j];
    }
}

// ln p and p of the teacher in place: t becomes ln p, the return array p. m, log_sum are only used for logits.
KR_FN void teacher_lanes(int kind, int classes, f32v* t, f32v* p, float inverse_t, f32v& m, f32v& log_sum) {
    if (kind == 0) {
        m = t[0];
        for (int j = 1; j < classes; ++j) m = max(t[j], m);
        f32v sum = splat(0.0f);
        for (int j = 0; j < classes; ++j) {
            t[j] = (t[j] - m) * splat(inverse_t);
            p[j] = vec_exp(t[j]);
            sum = sum + p[j];
        }
        log_sum = vec_log(sum);
        f32v scale = splat(1.0f) / sum;
        for (int j = 0; j < classes; ++j) {
            t[j] = t[j] - log_sum;
            p[j] = p[j] * scale;
        }
    } else {
        m = log_sum = splat(0.0f);
        for (int j = 0; j < classes; ++j) {
            p[j] = kind == 1 ? t[j] : vec_exp(t[j]);
            if (kind == 1) t[j] = vec_log(p[j]);
        }
    }
}

static void forward_lanes(const DistillationLoss& call, int64_t row, int count, float* row_loss, float* stats) {
    const int classes = (int)call.classes;
    const float inverse_t = 1.0f / call.temperature;
    LaneBlock block;
    load_lanes(call, row, count, block);
    f32v *s = block.s, *t = block.t, p[kLaneClasses], es[kLaneClasses], mt = splat(0.0f), log_t = splat(0.0f);
    f32v ms = s[0], sum_s = splat(0.0f), sum_1 = splat(0.0f), sum_z = splat(0.0f), z_label = splat(0.0f);
    for (int j = 1; j < classes; ++j) ms = max(s[j], ms);
    for (int j = 0; j < classes; ++j) {
        f32v centred = s[j] - ms;
        es[j] = vec_exp(centred * splat(inverse_t));
        sum_s = sum_s + es[j];
        if (call.hard != 0.0f) sum_1 = sum_1 + untempered(centred, es[j], call.temperature);
        sum_z = sum_z + centred;
        s[j] = centred;
    }
    f32v log_s = vec_log(sum_s), log_1 = call.hard != 0.0f ? vec_log(sum_1) : splat(0.0f), soft = splat(0.0f);
    if (call.soft != 0.0f) {
        teacher_lanes(call.target_kind, classes, t, p, inverse_t, mt, log_t);
        f32v scale = splat(1.0f) / sum_s;
        for (int j = 0; j < classes; ++j)
            soft = soft + kl_term(p[j], es[j] * scale, t[j] - (s[j] * splat(inverse_t) - log_s));
    }
    float out[6][kLanes];
    if (call.hard != 0.0f) {
        float labelled[kLanes];
        for (int r = 0; r < kLanes; ++r) {
            const int64_t label = call.labels[row + (r < count ? r : count - 1)];
            labelled[r] = label >= 0 && label < classes ? reinterpret_cast<float*>(s)[label * kLanes + r] : 0.0f;
        }
        z_label = load(labelled);
        f32v picked = z_label * splat(1.0f - call.smoothing);
        if (call.smoothing != 0.0f) picked = picked + sum_z * splat(call.smoothing / (float)classes);
        store(out[5], log_1 - picked);
    }
    store(out[0], ms), store(out[1], log_s), store(out[2], mt), store(out[3], log_t), store(out[4], log_1);
    float kl[kLanes];
    store(kl, soft);
    const float t2 = call.temperature * call.temperature;
    for (int r = 0; r < count; ++r) {
        float loss = call.soft != 0.0f ? call.soft * t2 * kl[r] : 0.0f;
        if (call.hard != 0.0f) loss += call.hard * out[5][r];
        row_loss[row + r] = loss;
        for (int k = 0; k < kLossStats; ++k) stats[(row + r) * kLossStats + k] = out[k][r];
    }
}

static void backward_lanes(const DistillationLoss& call, const float* stats, const float* factor, int64_t row,
                           int count, void* grad) {
    const int classes = (int)call.classes;
    const float inverse_t = 1.0f / call.temperature;
    LaneBlock block;
    load_lanes(call, row, count, block);
    float in[kLossStats + 1][kLanes];
    for (int r = 0; r < kLanes; ++r) {
        const int from = r < count ? r : count - 1;
        for (int k = 0; k < kLossStats; ++k) in[k][r] = stats[(row + from) * kLossStats + k];
        in[kLossStats][r] = factor[from];
    }
    const f32v ms = load(in[0]), log_s = load(in[1]), mt = load(in[2]), log_t = load(in[3]), log_1 = load(in[4]);
    const f32v scale = load(in[5]), soft = splat(call.soft * call.temperature), hard = splat(call.hard);
    const f32v smooth = splat(call.smoothing / (float)classes);
    float* g = reinterpret_cast<float*>(block.s);
    for (int j = 0; j < classes; ++j) {
        f32v centred = block.s[j] - ms, out = splat(0.0f);
        if (call.soft != 0.0f) {
            f32v q = vec_exp(centred * splat(inverse_t) - log_s), p = block.t[j];
            if (call.target_kind == 0) p = vec_exp((p - mt) * splat(inverse_t) - log_t);
            if (call.target_kind == 2) p = vec_exp(p);
            out = soft * (q - p);
        }
        if (call.hard != 0.0f) out = fma(hard, vec_exp(centred - log_1) - smooth, out);
        block.s[j] = out;
    }
    if (call.hard != 0.0f)
        for (int r = 0; r < count; ++r) {
            const int64_t label = call.labels[row + r];
            if (label >= 0 && label < classes) g[label * kLanes + r] -= call.hard * (1.0f - call.smoothing);
        }
    for (int j = 0; j < classes; ++j) block.s[j] = scale == splat(0.0f) ? splat(0.0f) : block.s[j] * scale;
    float line[kLaneClasses];
    for (int r = 0; r < count; ++r) {
        const int64_t at = (row + r) * classes;
        float* to = call.input_dtype == Dtype::f32 ? static_cast<float*>(grad) + at : line;
        for (int j = 0; j < classes; ++j) to[j] = g[j * kLanes + r];
        if (to == line) from_float_row(line, call.input_dtype, grad, at, classes);
    }
}

// ---------------------------------------------------------------- kLanes classes a vector, one row

#define KR_EACH_VECTOR(n)                                                                        \
    for (int64_t i = 0, left = (n); left > 0; i += kLanes, left -= kLanes)

KR_FN f32v take(const float* from, int64_t left, float fill) {
    return left >= kLanes ? load(from) : load_part(from, (int)left, fill);
}
KR_FN void put(float* to, f32v a, int64_t left) {
    if (left >= kLanes)
        store(to, a);
    else
        store_part(to, a, (int)left);
}

static float row_max(const float* a, int64_t n) {
    f32v best = splat(-__builtin_inff()), nan = splat(0.0f);
    KR_EACH_VECTOR(n) {
        f32v x = take(a + i, left, -__builtin_inff());
        best = max(x, best);
        nan = nan + (x != x ? splat(1.0f) : splat(0.0f));
    }
    return reduce_sum(nan) > 0.0f ? __builtin_nanf("") : reduce_max(best);
}

// work: 2 * classes floats of scratch (e^((s-m)/T) and the teacher's e or p).
static void forward_row(const DistillationLoss& call, const float* s, const float* t, int64_t row, float* work,
                        float* row_loss, float* stats) {
    const int64_t classes = call.classes;
    const float inverse_t = 1.0f / call.temperature, minus_inf = -__builtin_inff();
    float *es = work, *et = work + classes;
    const float ms = row_max(s, classes);
    double sum_s = 0, sum_1 = 0, sum_z = 0, sum_t = 0, soft = 0;
    // Blocks of 1,024 classes are summed in float and then in double: exact enough for vocabularies, cheap for images.
    for (int64_t start = 0; start < classes; start += 1024) {
        const int64_t n = classes - start < 1024 ? classes - start : 1024;
        f32v block_s = splat(0.0f), block_1 = splat(0.0f), block_z = splat(0.0f);
        KR_EACH_VECTOR(n) {
            f32v centred = take(s + start + i, left, minus_inf) - splat(ms);
            f32v e = vec_exp(centred * splat(inverse_t));
            put(es + start + i, e, left);
            block_s = block_s + e;
            if (call.hard != 0.0f) {
                block_1 = block_1 + untempered(centred, e, call.temperature);
                if (call.smoothing != 0.0f) block_z = block_z + (take(s + start + i, left, ms) - splat(ms));
            }
        }
        sum_s += reduce_sum(block_s), sum_1 += reduce_sum(block_1), sum_z += reduce_sum(block_z);
    }
    const float log_s = __builtin_logf((float)sum_s), log_1 = call.hard != 0.0f ? __builtin_logf((float)sum_1) : 0.0f;
    float mt = 0.0f, log_t = 0.0f;
    if (call.soft != 0.0f) {
        const int kind = call.target_kind;
        if (kind == 0) {
            mt = row_max(t, classes);
            for (int64_t start = 0; start < classes; start += 1024) {
                const int64_t n = classes - start < 1024 ? classes - start : 1024;
                f32v block_t = splat(0.0f);
                KR_EACH_VECTOR(n) {
                    f32v e = vec_exp((take(t + start + i, left, minus_inf) - splat(mt)) * splat(inverse_t));
                    put(et + start + i, e, left);
                    block_t = block_t + e;
                }
                sum_t += reduce_sum(block_t);
            }
            log_t = __builtin_logf((float)sum_t);
        }
        const f32v scale_s = splat(1.0f / (float)sum_s), scale_t = splat(kind == 0 ? 1.0f / (float)sum_t : 1.0f);
        for (int64_t start = 0; start < classes; start += 1024) {
            const int64_t n = classes - start < 1024 ? classes - start : 1024;
            f32v block = splat(0.0f);
            KR_EACH_VECTOR(n) {
                f32v tv = take(t + start + i, left, kind == 1 ? 0.0f : minus_inf), p, log_p;
                if (kind == 0) {
                    p = take(et + start + i, left, 0.0f) * scale_t;
                    log_p = (tv - splat(mt)) * splat(inverse_t) - splat(log_t);
                } else {
                    p = kind == 1 ? tv : vec_exp(tv);
                    log_p = kind == 1 ? vec_log(tv) : tv;
                }
                f32v q = take(es + start + i, left, 0.0f) * scale_s;
                f32v log_q = (take(s + start + i, left, ms) - splat(ms)) * splat(inverse_t) - splat(log_s);
                block = block + kl_term(p, q, log_p - log_q);
            }
            soft += reduce_sum(block);
        }
    }
    double loss = call.soft != 0.0f ? (double)call.soft * call.temperature * call.temperature * soft : 0.0;
    if (call.hard != 0.0f) {
        const int64_t label = call.labels[row];
        const double z = label >= 0 && label < classes ? (double)s[label] - ms : 0.0;
        double picked = z * (1.0 - call.smoothing);
        if (call.smoothing != 0.0f) picked += sum_z * call.smoothing / (double)classes;
        loss += call.hard * (log_1 - picked);
    }
    row_loss[row] = (float)loss;
    float* out = stats + row * kLossStats;
    out[0] = ms, out[1] = log_s, out[2] = mt, out[3] = log_t, out[4] = log_1;
}

static void backward_row(const DistillationLoss& call, const float* s, const float* t, const float* stats, float factor,
                         int64_t row, float* grad) {
    const int64_t classes = call.classes;
    const float* in = stats + row * kLossStats;
    const f32v inverse_t = splat(1.0f / call.temperature), ms = splat(in[0]), log_s = splat(in[1]), mt = splat(in[2]);
    const f32v log_t = splat(in[3]), log_1 = splat(in[4]), scale = splat(factor);
    const f32v soft = splat(call.soft * call.temperature), smooth = splat(call.smoothing / (float)classes);
    KR_EACH_VECTOR(classes) {
        f32v centred = take(s + i, left, 0.0f) - ms, out = splat(0.0f);
        if (call.soft != 0.0f) {
            f32v q = vec_exp(centred * inverse_t - log_s), p = take(t + i, left, 0.0f);
            if (call.target_kind == 0) p = vec_exp((p - mt) * inverse_t - log_t);
            if (call.target_kind == 2) p = vec_exp(p);
            out = soft * (q - p);
        }
        if (call.hard != 0.0f) out = fma(splat(call.hard), vec_exp(centred - log_1) - smooth, out);
        put(grad + i, out * scale, left);
    }
    if (call.hard != 0.0f) {
        const int64_t label = call.labels[row];
        if (label >= 0 && label < classes) grad[label] -= factor * call.hard * (1.0f - call.smoothing);
    }
}
#undef KR_EACH_VECTOR

// ---------------------------------------------------------------- a range of rows

static void forward_range(const DistillationLoss& call, int64_t begin, int64_t end, float* row_loss, float* stats,
                          float* work) {
    if (call.classes <= kLaneClasses) {
        for (int64_t row = begin; row < end; row += kLanes)
            forward_lanes(call, row, (int)(end - row < kLanes ? end - row : kLanes), row_loss, stats);
        return;
    }
    const int64_t n = call.classes;
    for (int64_t row = begin; row < end; ++row) {
        const float* s = to_float_row(call.input, call.input_dtype, row * call.input_stride, n, work + 2 * n);
        const float* t = to_float_row(call.target, call.target_dtype, row * call.target_stride, n, work + 3 * n);
        forward_row(call, s, t, row, work, row_loss, stats);
    }
}

// factor[r] is the whole factor of row begin + r: upstream gradient, weight and 1 / W; 0 for an ignored row.
static void backward_range(const DistillationLoss& call, const float* stats, const float* factor, int64_t begin,
                           int64_t end, void* grad, float* work) {
    if (call.classes <= kLaneClasses) {
        for (int64_t row = begin; row < end; row += kLanes)
            backward_lanes(call, stats, factor + (row - begin), row, (int)(end - row < kLanes ? end - row : kLanes),
                           grad);
        return;
    }
    const int64_t n = call.classes;
    const bool direct = call.input_dtype == Dtype::f32;
    for (int64_t row = begin; row < end; ++row) {
        float* to = direct ? static_cast<float*>(grad) + row * n : work;
        if (factor[row - begin] == 0.0f) {
            for (int64_t i = 0; i < n; ++i) to[i] = 0.0f;
        } else {
            const float* s = to_float_row(call.input, call.input_dtype, row * call.input_stride, n, work + 2 * n);
            const float* t = to_float_row(call.target, call.target_dtype, row * call.target_stride, n, work + 3 * n);
            backward_row(call, s, t, stats, factor[row - begin], row, to);
        }
        if (!direct) from_float_row(to, call.input_dtype, grad, row * n, n);
    }
}
