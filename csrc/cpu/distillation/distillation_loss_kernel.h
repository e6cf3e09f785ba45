// Included once per instruction set by distillation_loss.cpp.
//
// Two layouts. Up to kLaneClasses classes a vector holds the same class of kLanes rows: no reductions across lanes and
// no tails. Above that a vector holds kLanes classes of one row, and the row stays in L1 between its passes.
#include "cpu/simd/softmax_row.h"

constexpr int kLaneClasses = 128;  // four arrays of kLanes x 128 floats stay in L1
constexpr int kGroup = 16;         // exponentials summed at a time: 100 additions in a row double the gradient's error

// Which of the two layouts a call takes; the second needs work of 5 * classes floats.
static inline bool across_lanes(const DistillationLoss& call) {
    return call.classes <= kLaneClasses && call.divergence != Divergence::decoupled;
}

KR_FN f32v cross_term(f32v p, f32v log_q) { return p == splat(0.0f) ? splat(0.0f) : -(p * log_q); }

KR_FN const float* student_row(const DistillationLoss& call, int64_t row, float* scratch) {
    return to_float_row(call.input, call.input_dtype, row * call.input_stride, call.classes, scratch);
}

// A row that is stored as top-k probabilities, written out.
static const float* topk_row(const DistillationLoss& call, int64_t row, float* scratch) {
    const int64_t *indices = call.indices + row * call.top_k, at = row * call.target_stride;
    float sum = 0.0f;
    for (int64_t k = 0; k < call.top_k; ++k) sum += element(call.target, call.target_dtype, at + k);
    const int64_t others = call.classes - call.top_k;
    const float rest = call.smooth_tail && others > 0 && sum < 1.0f ? (1.0f - sum) / (float)others : 0.0f;
    const float scale = call.smooth_tail ? 1.0f : 1.0f / sum;
    for (int64_t j = 0; j < call.classes; ++j) scratch[j] = rest;
    for (int64_t k = 0; k < call.top_k; ++k)
        scratch[indices[k]] = scale * element(call.target, call.target_dtype, at + k);
    return scratch;
}

KR_FN const float* teacher_row(const DistillationLoss& call, int64_t row, float* scratch) {
    return call.indices ? topk_row(call, row, scratch)
                        : to_float_row(call.target, call.target_dtype, row * call.target_stride, call.classes, scratch);
}

// ---------------------------------------------------------------- one class a vector, kLanes rows

// losses[r] (unweighted) if asked for; grad times factor[r] if grad is not null. Both arrays hold kLanes floats; zeros
// says that a factor may be 0, which makes the gradient 0 whatever the row holds.
template <int kPower>
static void loss_lanes(const DistillationLoss& call, bool want_loss, int64_t row, int count, const float* factor,
                       bool zeros, float* losses, void* grad) {
    const int classes = (int)call.classes;
    const bool soft = call.soft != 0.0f, hard = call.hard != 0.0f;
    const bool cross = call.divergence == Divergence::cross;
    const f32v inverse_t = splat(1.0f / call.temperature), binary = splat(kLog2E / call.temperature);
    const f32v zero = splat(0.0f), one = splat(1.0f), temperature = splat(call.temperature);
    alignas(64) float s_lanes[kLaneClasses * kLanes], t_lanes[kLaneClasses * kLanes], scratch[kLaneClasses * kLanes];
    f32v es[kLaneClasses], et[kLaneClasses];

    const TargetKind kind = call.target_kind;
    const float* rows[kLanes];  // the last of `count` rows is repeated
    for (int r = 0; r < kLanes; ++r)
        rows[r] = r < count ? student_row(call, row + r, scratch + r * classes) : rows[r - 1];
    load_lanes(rows, classes, s_lanes);
    f32v top = load(s_lanes), sum_s = zero, sum_1 = zero, sum_z = zero, label = splat(-1.0f);
    for (int j = 1; j < classes; ++j) top = max(load(s_lanes + j * kLanes), top);
    for (int from = 0; from < classes; from += kGroup) {
        f32v part_s = zero, part_1 = zero;
        for (int j = from; j < classes && j < from + kGroup; ++j) {
            const f32v centred = load(s_lanes + j * kLanes) - top;
            es[j] = vec_exp_scaled(centred, binary);
            part_s = part_s + es[j];
            if (hard) part_1 = part_1 + untempered<kPower>(centred, es[j]);
            if (call.smoothing != 0.0f) sum_z = sum_z + centred;
            store(s_lanes + j * kLanes, centred);
        }
        sum_s = sum_s + part_s, sum_1 = sum_1 + part_1;
    }
    f32v sum_t = one;
    if (soft) {
        for (int r = 0; r < kLanes; ++r)
            rows[r] = r < count ? teacher_row(call, row + r, scratch + r * classes) : rows[r - 1];
        load_lanes(rows, classes, t_lanes);
        if (kind == TargetKind::logits) {
            f32v top_t = load(t_lanes);
            sum_t = zero;
            for (int j = 1; j < classes; ++j) top_t = max(load(t_lanes + j * kLanes), top_t);
            for (int from = 0; from < classes; from += kGroup) {
                f32v part = zero;
                for (int j = from; j < classes && j < from + kGroup; ++j) {
                    const f32v centred = load(t_lanes + j * kLanes) - top_t;
                    et[j] = vec_exp_scaled(centred, binary);
                    part = part + et[j];
                    store(t_lanes + j * kLanes, centred);
                }
                sum_t = sum_t + part;
            }
        } else {
            for (int j = 0; j < classes; ++j) {
                const f32v t = load(t_lanes + j * kLanes);
                et[j] = kind == TargetKind::probs ? t : vec_exp(t);
                store(t_lanes + j * kLanes, (kind == TargetKind::probs ? vec_log(t) : t) * temperature);
            }
        }
    }
    if (hard) {
        float lanes[kLanes] = {};
        for (int r = 0; r < count; ++r) lanes[r] = (float)call.labels[row + r];
        label = load(lanes);
    }
    const f32v scale = load(factor), scale_s = one / sum_s, scale_t = one / sum_t;
    const f32v shift = vec_log(sum_t / sum_s);  // ln p - ln q = (t - s) / T - shift; the quotient of equals is 1
    const f32v log_s = cross ? vec_log(sum_s) : zero;
    const f32v soft_scale = splat(call.soft * call.temperature) * scale, scale_1 = splat(call.hard) * scale / sum_1;
    const f32v on = splat(call.hard * (1.0f - call.smoothing)) * scale;
    const f32v smooth = splat(call.hard * call.smoothing / (float)classes) * scale;
    f32v kl = zero, z_label = zero, index = zero;
    for (int j = 0; j < classes; ++j, index = index + one) {
        const f32v centred = load(s_lanes + j * kLanes);
        f32v out = zero;
        if (soft) {
            // Both products are rounded, so that equal rows give exactly 0.
            const f32v p = et[j] * scale_t, q = es[j] * scale_s;
            if (want_loss && cross)
                kl = kl + cross_term(p, fma(centred, inverse_t, -log_s));
            else if (want_loss)
                kl = kl + kl_term(p, q, (load(t_lanes + j * kLanes) - centred) * inverse_t - shift);
            out = soft_scale * (q - p);
        }
        if (hard) {
            z_label = label == index ? centred : z_label;
            out = out + fma(untempered<kPower>(centred, es[j]), scale_1, -smooth);
            out = label == index ? out - on : out;
        }
        store(s_lanes + j * kLanes, out);
    }
    if (want_loss) {
        f32v loss = splat(call.soft * call.temperature * call.temperature) * kl;
        if (hard) {
            f32v picked = z_label * splat(1.0f - call.smoothing);
            if (call.smoothing != 0.0f) picked = fma(sum_z, splat(call.smoothing / (float)classes), picked);
            loss = fma(splat(call.hard), vec_log(sum_1) - picked, loss);
        }
        store(losses, loss);
    }
    if (!grad) return;
    for (int r = 0; zeros && r < count; ++r)
        if (factor[r] == 0.0f)
            for (int j = 0; j < classes; ++j) s_lanes[j * kLanes + r] = 0.0f;
    store_lanes(s_lanes, grad, call.input_dtype, row, count, classes, scratch);
}

// ---------------------------------------------------------------- kLanes classes a vector, one row

// work: 2 * classes floats. The loss of the row, unweighted; its gradient times factor into grad unless that is null.
template <int kPower>
static float loss_row(const DistillationLoss& call, bool want_loss, const float* s, const float* t, int64_t row,
                      float factor, float* work, float* grad) {
    const int64_t classes = call.classes, label = call.labels ? call.labels[row] : -1;
    const bool soft = call.soft != 0.0f, hard = call.hard != 0.0f;
    const bool cross = call.divergence == Divergence::cross;
    const TargetKind kind = call.target_kind;
    const float T = call.temperature, minus_inf = -__builtin_inff(), top = row_max(s, classes);
    float *es = work, *et = work + classes, top_t = 0.0f;
    const RowSums sums = exponentials<kPower>(s, classes, top, T, hard, hard && call.smoothing != 0.0f, es);
    double sum_t = 1, kl = 0;
    if (soft && kind == TargetKind::logits) {
        top_t = row_max(t, classes);
        sum_t = exponentials<1>(t, classes, top_t, T, false, false, et).tempered;
    }
    const f32v scale_s = splat(1.0f / (float)sums.tempered), scale_t = splat(1.0f / (float)sum_t);
    // ln p - ln q = (t - s) / T - shift for teacher logits
    const f32v shift = splat((float)__builtin_log(sum_t / sums.tempered)), inverse_t = splat(1.0f / T);
    const f32v tops = splat(top), tops_t = splat(top_t);
    const f32v log_s = splat((float)__builtin_log(sums.tempered)), soft_scale = splat(factor * call.soft * T);
    const f32v scale_1 = splat(hard ? factor * call.hard / (float)sums.plain : 0.0f);
    const f32v smooth = splat(factor * call.hard * call.smoothing / (float)classes);
    for (int64_t start = 0; start < classes; start += kBlock) {
        f32v block = splat(0.0f);
        KR_EACH_VECTOR(block_length(classes, start)) {
            const f32v centred = take(s + start + i, left, top) - tops, e = take(es + start + i, left, 0.0f);
            f32v out = splat(0.0f);
            if (soft) {
                const f32v tv = take(t + start + i, left, kind == TargetKind::probs ? 0.0f : minus_inf),
                           q = e * scale_s;
                f32v p, log_p;
                if (kind == TargetKind::logits) {
                    p = take(et + start + i, left, 0.0f) * scale_t;
                    log_p = (tv - tops_t) * inverse_t;
                } else {
                    p = kind == TargetKind::probs ? tv : vec_exp(tv);
                    log_p = kind == TargetKind::probs ? vec_log(tv) : tv;
                }
                if (want_loss && cross)
                    block = block + cross_term(p, fma(centred, inverse_t, -log_s));
                else if (want_loss)
                    block = block + kl_term(p, q, log_p - centred * inverse_t - shift);
                out = soft_scale * (q - p);
            }
            if (grad) {
                if (hard) out = out + fma(untempered<kPower>(centred, e), scale_1, -smooth);
                put(grad + start + i, out, left);
            }
        }
        kl += reduce_sum(block);
    }
    if (grad && hard && label >= 0 && label < classes) grad[label] -= factor * call.hard * (1.0f - call.smoothing);
    if (!want_loss) return 0.0f;
    double loss = soft ? (double)call.soft * T * T * kl : 0.0;
    if (hard) {
        const double z = label >= 0 && label < classes ? (double)s[label] - top : 0.0;
        double picked = z * (1.0 - call.smoothing);
        if (call.smoothing != 0.0f) picked += sums.centred * call.smoothing / (double)classes;
        loss += call.hard * (__builtin_logf((float)sums.plain) - picked);
    }
    return (float)loss;
}

// p (d + expm1(-d)) of two numbers
static inline double kl_of(double p, double q, double d) { return p == 0.0 ? q : p * (d + __builtin_expm1(-d)); }
static inline double log_sigmoid(double a) {
    return a < 0 ? a - __builtin_log1p(__builtin_exp(a)) : -__builtin_log1p(__builtin_exp(-a));
}

// As loss_row, with the divergence decoupled: of (label, rest) as two outcomes, and within the rest. The label is taken
// out of the rows, so that 1 - q_label keeps its digits where q_label is near 1. work: 4 * classes floats, whose second
// half may hold s and t.
template <int kPower>
static float dkd_row(const DistillationLoss& call, bool want_loss, const float* s, const float* t, int64_t row,
                     float factor, float* work, float* grad) {
    const int64_t classes = call.classes, label = call.labels[row];
    const bool hard = call.hard != 0.0f;
    float *es = work, *et = work + classes, *rest_s = work + 2 * classes, *rest_t = work + 3 * classes;
    if (s != rest_s) std::memcpy(rest_s, s, sizeof(float) * (size_t)classes);
    if (t != rest_t) std::memcpy(rest_t, t, sizeof(float) * (size_t)classes);
    const float z_s = s[label], z_t = t[label], T = call.temperature, minus_inf = -__builtin_inff();
    rest_s[label] = rest_t[label] = minus_inf;
    const float top_s = row_max(rest_s, classes), top_t = row_max(rest_t, classes);
    const RowSums sums = exponentials<kPower>(rest_s, classes, top_s, T, hard, false, es);
    const double sum_t = exponentials<1>(rest_t, classes, top_t, T, false, false, et).tempered;
    // The label's logit against the rest: its probability is the sigmoid.
    const double a_s = ((double)z_s - top_s) / T - __builtin_log(sums.tempered);
    const double a_t = ((double)z_t - top_t) / T - __builtin_log(sum_t);
    const double a_1 = hard ? (double)z_s - top_s - __builtin_log(sums.plain) : 0.0;
    const double log_q = log_sigmoid(a_s), log_p = log_sigmoid(a_t), log_q_rest = log_sigmoid(-a_s);
    const double log_p_rest = log_sigmoid(-a_t), q = __builtin_exp(log_q), p = __builtin_exp(log_p);
    const double q_rest = __builtin_exp(log_q_rest), p_rest = __builtin_exp(log_p_rest);
    const double pull = q < 0.5 ? q - p : p_rest - q_rest;

    const f32v scale_s = splat(1.0f / (float)sums.tempered), scale_t = splat(1.0f / (float)sum_t);
    const f32v shift = splat((float)__builtin_log(sum_t / sums.tempered)), inverse_t = splat(1.0f / T);
    const f32v beta = splat(factor * T * call.beta), alpha = splat((float)(factor * T * call.alpha * pull));
    const double rest_1 = __builtin_exp(log_sigmoid(-a_1));
    const f32v scale_1 = splat(hard ? (float)(factor * call.hard * rest_1 / sums.plain) : 0.0f);
    double kl = 0;
    for (int64_t start = 0; start < classes; start += kBlock) {
        f32v block = splat(0.0f);
        KR_EACH_VECTOR(block_length(classes, start)) {
            const int64_t at = start + i;
            const f32v centred = take(rest_s + at, left, minus_inf) - splat(top_s), e = take(es + at, left, 0.0f);
            const f32v q_hat = e * scale_s, p_hat = take(et + at, left, 0.0f) * scale_t;
            if (want_loss) {
                const f32v d = (take(rest_t + at, left, minus_inf) - splat(top_t) - centred) * inverse_t - shift;
                block = block + kl_term(p_hat, q_hat, d);
            }
            if (grad) {
                f32v out = fma(beta, q_hat - p_hat, -(alpha * q_hat));
                if (hard) out = fma(untempered<kPower>(centred, e), scale_1, out);
                put(grad + at, out, left);
            }
        }
        kl += reduce_sum(block);
    }
    if (grad) grad[label] = (float)(factor * (T * call.alpha * pull - call.hard * rest_1));
    if (!want_loss) return 0.0f;
    const double two = kl_of(p, q, log_p - log_q) + kl_of(p_rest, q_rest, log_p_rest - log_q_rest);
    return (float)((double)T * T * (call.alpha * two + call.beta * kl) - (hard ? call.hard * log_sigmoid(a_1) : 0.0));
}
#undef KR_EACH_VECTOR

// ---------------------------------------------------------------- a block of rows

constexpr int kBlockRows = 64;

template <int kPower>
static double loss_block_of(const DistillationLoss& call, const DistillationRequest& request, double scale,
                            int64_t begin, int64_t end, float* work) {
    const int64_t n = call.classes;
    const int count = (int)(end - begin);
    float weight[kBlockRows], factor[kBlockRows], losses[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) weight[r] = 1.0f, losses[r] = 0.0f;
    if (call.weight)
        for (int r = 0; r < count; ++r) weight[r] = call.weight[begin + r];
    if (call.labels)
        for (int r = 0; r < count; ++r) weight[r] = call.labels[begin + r] == call.ignore_index ? 0.0f : weight[r];
    for (int r = 0; r < kBlockRows; ++r) factor[r] = (float)scale * weight[r];
    if (request.upstream)
        for (int r = 0; r < count; ++r)
            factor[r] = weight[r] == 0.0f  // 0 also under an infinite upstream gradient: such a row is not read
                            ? 0.0f
                            : (float)(request.upstream[(begin + r) * request.upstream_step] * scale) * weight[r];

    bool zeros = false;
    for (int r = 0; r < count; ++r) zeros |= factor[r] == 0.0f;
    const bool decoupled = call.divergence == Divergence::decoupled;
    if (across_lanes(call)) {
        for (int r = 0; r < count; r += kLanes)
            loss_lanes<kPower>(call, request.loss, begin + r, count - r < kLanes ? count - r : kLanes, factor + r,
                               zeros, losses + r, request.grad);
    } else {
        const bool direct = call.input_dtype == Dtype::f32;
        for (int r = 0; r < count; ++r) {
            const int64_t row = begin + r;
            float* grad = !request.grad ? nullptr : direct ? static_cast<float*>(request.grad) + row * n : work + 4 * n;
            if (factor[r] != 0.0f || (request.loss && weight[r] != 0.0f)) {
                const float *s = student_row(call, row, work + 2 * n), *t = teacher_row(call, row, work + 3 * n);
                losses[r] = decoupled ? dkd_row<kPower>(call, request.loss, s, t, row, factor[r], work, grad)
                                      : loss_row<kPower>(call, request.loss, s, t, row, factor[r], work, grad);
            }
            if (grad && factor[r] == 0.0f)
                for (int64_t i = 0; i < n; ++i) grad[i] = 0.0f;
            if (grad && !direct) from_float_row(grad, call.input_dtype, request.grad, row * n, n);
        }
    }
    double sum = 0;
    for (int r = 0; r < count; ++r) losses[r] = weight[r] == 0.0f ? 0.0f : weight[r] * losses[r];
    if (request.row_loss)
        for (int r = 0; r < count; ++r) request.row_loss[begin + r] = losses[r];
    for (int r = 0; r < kBlockRows; r += 8) {
        double part = 0;
        for (int k = r; k < r + 8; ++k) part += k < count ? losses[k] : 0.0f;
        sum += part;
    }
    return sum;
}

// Rows [begin, end), at most kBlockRows; the sum of their weighted losses is returned. scale is 1 / W or 1.
static double loss_block(const DistillationLoss& call, const DistillationRequest& request, double scale, int64_t begin,
                         int64_t end, float* work) {
    const float T = call.temperature;
    return call.hard == 0.0f || T == 1.0f ? loss_block_of<1>(call, request, scale, begin, end, work)
           : T == 2.0f                    ? loss_block_of<2>(call, request, scale, begin, end, work)
           : T == 4.0f                    ? loss_block_of<4>(call, request, scale, begin, end, work)
                                          : loss_block_of<kNoPower>(call, request, scale, begin, end, work);
}
