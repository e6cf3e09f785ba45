// The distillation loss of one row, held by the lanes of a group. The formula stands in
// kr_fast/ops/distillation/distillation_loss.py; those of the decoupled loss in kr_fast/ops/distillation/dkd_loss.py.
#pragma once
#include <cmath>

#include "cuda/distillation/distillation_loss_job.h"

namespace kr {
namespace cuda {

constexpr float kLn2 = 0.693147181f;

// 2^x and log2(x) by the special function unit: 2 ulp, and an absolute error of 2^-22 for the logarithm near 1.
#ifdef __CUDACC__
KR_FN float exp2_fast(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
KR_FN float log2_fast(float x) {
    float out;
    asm("lg2.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
#else
KR_FN float exp2_fast(float x) { return exp2f(x); }
KR_FN float log2_fast(float x) { return log2f(x); }
#endif

KR_FN float log_sigmoid(float a) { return fminf(a, 0.0f) - log1pf(expf(-fabsf(a))); }

// p (d + expm1(-d)) with d = ln p - ln q, and q - p, neither of which cancels where p is near q. A NaN comes through.
KR_FN float kl_term(float p, float q, float d, float& difference) {
    float series = 1.0f / 720 - d * (1.0f / 5040);
    series = 1.0f / 24 + d * (-1.0f / 120 + d * series);
    series = d * d * (0.5f + d * (-1.0f / 6 + d * series));
    const bool near = fabsf(d) < 0.25f;
    const float plain = q - p, far = p * d + plain;
    difference = p == 0.0f ? q : near ? p * (series - d) : plain;
    return p == 0.0f ? q : near ? p * series : far < 0.0f ? 0.0f : far;
}

// What is known of a row before its terms. The first five are stored by the forward pass, in this order.
struct RowState {
    float top, sum_s, top_t, sum_t, sum_1;  // maxima, and sums of e^((z - top) / T), of the student also at T = 1
    float scale_s, scale_t, scale_1;        // their inverses
    float shift, log_s, log_1;              // shift = ln(sum_t / sum_s)
    float z_label, t_label;
};

// Teacher values become T ln p, whatever they were; for logits up to a constant of the row.
template <int K>
KR_FN void teacher_logs(const DistillationJob& job, float (&t)[K]) {
    if (job.call.target_kind == TargetKind::probs) {
#pragma unroll
        for (int k = 0; k < K; ++k) t[k] = job.call.temperature * (kLn2 * log2_fast(t[k]));
    } else if (job.call.target_kind == TargetKind::log_probs) {
#pragma unroll
        for (int k = 0; k < K; ++k) t[k] *= job.call.temperature;
    }
}

// A block of columns of a row that is stored as its k largest probabilities.
template <class Columns, int K>
KR_FN void read_topk(const DistillationJob& job, int64_t row, int first, int lane, float (&t)[K]) {
    const DistillationLoss& call = job.call;
    const int count = (int)call.top_k, others = (int)call.classes - count;
    float sum = 0.0f;
#pragma unroll 1
    for (int k = 0; k < count; ++k) sum += read_element(call.target, call.target_dtype, row * call.target_stride + k);
    const float rest = call.smooth_tail && others > 0 && sum < 1.0f ? (1.0f - sum) / (float)others : 0.0f;
    const float scale = call.smooth_tail ? 1.0f : 1.0f / sum;
#pragma unroll
    for (int k = 0; k < K; ++k) t[k] = first + Columns::column(lane, k) < call.classes ? rest : 0.0f;
#pragma unroll 1
    for (int each = 0; each < count; ++each) {
        const float value = scale * read_element(call.target, call.target_dtype, row * call.target_stride + each);
        const int index = (int)call.indices[row * count + each] - first;
#pragma unroll
        for (int k = 0; k < K; ++k) t[k] = Columns::column(lane, k) == index ? value : t[k];
    }
}

// A lane's elements of the columns from `first` on, of student (a 16-bit dtype with kHalf, else float32) and teacher.
template <bool kHalf, int V, int CHUNKS, int LANES>
KR_FN void read_columns(const DistillationJob& job, int64_t row, int first, int lane, float (&s)[V * CHUNKS],
                        float (&t)[V * CHUNKS]) {
    const DistillationLoss& call = job.call;
    const int classes = (int)call.classes;
    const int64_t at = row * call.input_stride, at_t = row * call.target_stride;
    if (!kHalf)
        read_row<F32, V, CHUNKS, LANES>(call.input, at, job.input_access, first, classes, lane, false, s);
    else if (call.input_dtype == Dtype::bf16)
        read_row<BF16, V, CHUNKS, LANES>(call.input, at, job.input_access, first, classes, lane, false, s);
    else
        read_row<F16, V, CHUNKS, LANES>(call.input, at, job.input_access, first, classes, lane, false, s);
    if (call.soft == 0.0f) {
#pragma unroll
        for (int k = 0; k < V * CHUNKS; ++k) t[k] = 0.0f;
        return;
    }
    if (call.indices) {
        read_topk<Layout<V, CHUNKS, LANES>>(job, row, first, lane, t);
    } else {
        with_dtype(call.target_dtype, [&](auto dtype) {
            read_row<decltype(dtype), V, CHUNKS, LANES>(call.target, at_t, job.target_access, first, classes, lane,
                                                        job.call.target_kind == TargetKind::probs, t);
        });
    }
    teacher_logs(job, t);
}

template <bool kHalf, int V, int CHUNKS, int LANES>
KR_FN void write_columns(const DistillationJob& job, int64_t row, int first, int lane, const float (&g)[V * CHUNKS]) {
    const int64_t at = row * job.call.classes;
    const int classes = (int)job.call.classes;
    if (!kHalf)
        write_row<F32, V, CHUNKS, LANES>(job.buffers.grad, at, job.grad_access, first, classes, lane, g);
    else if (job.call.input_dtype == Dtype::bf16)
        write_row<BF16, V, CHUNKS, LANES>(job.buffers.grad, at, job.grad_access, first, classes, lane, g);
    else
        write_row<F16, V, CHUNKS, LANES>(job.buffers.grad, at, job.grad_access, first, classes, lane, g);
}

// The label's logits, and for the decoupled loss the label taken out of both rows.
template <class Columns, int K>
KR_FN void take_label_out(const DistillationRow& row, int first, int lane, float (&s)[K], float (&t)[K]) {
    const int index = row.label - first;
#pragma unroll
    for (int k = 0; k < K; ++k)
        if (Columns::column(lane, k) == index) s[k] = t[k] = -INFINITY;
}

KR_FN void read_label(const DistillationJob& job, const DistillationRow& row, RowState& state) {
    const DistillationLoss& call = job.call;
    state.z_label = state.t_label = 0.0f;
    if (row.label < 0) return;
    if (call.hard != 0.0f || call.divergence == Divergence::decoupled)
        state.z_label = read_element(call.input, call.input_dtype, row.row * call.input_stride + row.label);
    if (call.divergence == Divergence::decoupled)
        state.t_label = read_element(call.target, call.target_dtype, row.row * call.target_stride + row.label);
}

KR_FN void follow_from_sums(RowState& state) {
    state.scale_s = 1.0f / state.sum_s, state.scale_t = 1.0f / state.sum_t, state.scale_1 = 1.0f / state.sum_1;
    state.shift = logf(state.sum_t / state.sum_s);  // the quotient of equal sums is exactly 1
    state.log_s = logf(state.sum_s), state.log_1 = logf(state.sum_1);
}

KR_FN void store_state(const DistillationJob& job, int64_t row, const RowState& state) {
    float* to = job.buffers.stats + row * kDistillationStats;
    to[0] = state.top, to[1] = state.sum_s, to[2] = state.top_t, to[3] = state.sum_t, to[4] = state.sum_1;
}

KR_FN void load_state(const DistillationJob& job, int64_t row, RowState& state) {
    const float* from = job.buffers.stats + row * kDistillationStats;
    state.top = from[0], state.sum_s = from[1], state.top_t = from[2], state.sum_t = from[3], state.sum_1 = from[4];
    follow_from_sums(state);
}

KR_FN void set_sums(const DistillationJob& job, const float (&sums)[3], RowState& state) {
    state.sum_s = sums[0];
    state.sum_1 = job.call.hard != 0.0f ? sums[1] : 1.0f;
    state.sum_t = reads_teacher_logits(job.call) ? sums[2] : 1.0f;
    follow_from_sums(state);
}

// The sum of the divergence's terms over a lane's elements; t becomes q - p, and s is centred.
template <int K>
KR_FN float soft_terms(const DistillationJob& job, const RowState& state, float (&s)[K], float (&t)[K]) {
    float sum = 0.0f;
    const bool cross = job.call.divergence == Divergence::cross;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        s[k] -= state.top;
        if (job.call.soft != 0.0f) {
            const float centred = t[k] - state.top_t;
            const float p = mul(exp2_fast(centred * job.exponent), state.scale_t);
            const float q = mul(exp2_fast(s[k] * job.exponent), state.scale_s);
            const float d = fma(centred - s[k], job.inverse_t, -state.shift);
            float term = kl_term(p, q, d, t[k]);
            if (cross) term = p == 0.0f ? 0.0f : -p * (s[k] * job.inverse_t - state.log_s);
            sum += term;
        } else {
            t[k] = 0.0f;
        }
    }
    return sum;
}

// Parts of the decoupled loss: the label against the rest, of student and teacher.
struct Decoupled {
    float two, pull, a_1;  // divergence of the two outcomes; alpha times its gradient; the label's logit at T = 1
};

KR_FN Decoupled decoupled_parts(const DistillationJob& job, const RowState& state) {
    const float a_s = (state.z_label - state.top) * job.inverse_t - state.log_s;
    const float a_t = (state.t_label - state.top_t) * job.inverse_t - logf(state.sum_t);
    const float log_q = log_sigmoid(a_s), log_q_rest = log_sigmoid(-a_s);
    const float log_p = log_sigmoid(a_t), log_p_rest = log_sigmoid(-a_t);
    float here, rest;
    Decoupled out;
    out.two = kl_term(expf(log_p), expf(log_q), log_p - log_q, here) +
              kl_term(expf(log_p_rest), expf(log_q_rest), log_p_rest - log_q_rest, rest);
    out.pull = job.call.alpha * (a_s < 0.0f ? here : -rest);
    out.a_1 = state.z_label - state.top - state.log_1;
    return out;
}

// The row's loss, unweighted. kl: sum of the terms; centred: sum of s - top, for label smoothing.
KR_FN float row_loss(const DistillationJob& job, const DistillationRow& row, const RowState& state, float kl,
                     float centred) {
    const DistillationLoss& call = job.call;
    const bool decoupled = call.divergence == Divergence::decoupled;
    float loss = call.soft * call.temperature * call.temperature * kl;
    if (decoupled) {
        const Decoupled parts = decoupled_parts(job, state);
        loss = call.soft * call.temperature * call.temperature * (call.alpha * parts.two + call.beta * kl);
        if (call.hard != 0.0f) loss -= call.hard * log_sigmoid(parts.a_1);
    } else if (call.hard != 0.0f) {
        float picked = (state.z_label - state.top) * (1.0f - call.smoothing);
        if (call.smoothing != 0.0f) picked += centred * (call.smoothing / (float)call.classes);
        loss += call.hard * (state.log_1 - picked);
    }
    // A label outside [0, C) is a caller's bug; on a device it cannot raise, so it poisons the loss.
    return (call.hard != 0.0f || decoupled) && row.label < 0 ? NAN : loss;
}

// The gradient of a lane's elements, into s. s is centred and t is q - p.
template <class Columns, int K>
KR_FN void gradient(const DistillationJob& job, const DistillationRow& row, const RowState& state, int first, int lane,
                    float (&s)[K], const float (&t)[K]) {
    const DistillationLoss& call = job.call;
    const float soft = row.factor * (call.soft * call.temperature), hard = row.factor * call.hard;
    const int index = row.label - first;
    if (call.divergence == Divergence::decoupled) {
        const Decoupled parts = decoupled_parts(job, state);
        const float rest = expf(log_sigmoid(-parts.a_1)), pull = soft * parts.pull;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const float q = exp2_fast(s[k] * job.exponent) * state.scale_s;
            float out = soft * call.beta * t[k] - pull * q, here = pull;
            if (call.hard != 0.0f) {
                out += hard * rest * (exp2_fast(s[k] * kLog2E) * state.scale_1);
                here -= hard * rest;
            }
            s[k] = Columns::column(lane, k) == index ? here : out;
        }
    } else if (call.hard != 0.0f) {
        const float smooth = call.smoothing / (float)call.classes, on = hard * (1.0f - call.smoothing);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const float out = soft * t[k] + hard * fma(exp2_fast(s[k] * kLog2E), state.scale_1, -smooth);
            s[k] = Columns::column(lane, k) == index ? out - on : out;
        }
    } else {
#pragma unroll
        for (int k = 0; k < K; ++k) s[k] = soft * t[k];
    }
}

// A whole row in the registers of a group: its loss is returned, and its gradient left in s if one is requested.
template <class Columns, class Group, int K>
KR_FN float whole_row(const DistillationJob& job, const DistillationRow& row, Group& group, float (&s)[K],
                      float (&t)[K]) {
    const DistillationLoss& call = job.call;
    const bool hard = call.hard != 0.0f, logits = reads_teacher_logits(call);
    RowState state;
    read_label(job, row, state);
    if (call.divergence == Divergence::decoupled) take_label_out<Columns>(row, 0, group.lane, s, t);
    if (job.from_stats) {
        load_state(job, row.row, state);
    } else {
        float tops[2] = {s[0], logits ? t[0] : 0.0f};
#pragma unroll
        for (int k = 1; k < K; ++k) {
            tops[0] = fmaxf(tops[0], s[k]);
            if (logits) tops[1] = fmaxf(tops[1], t[k]);
        }
        group.max(tops);
        state.top = tops[0], state.top_t = tops[1];
        float sums[3] = {0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < K; ++k) {
            sums[0] += exp2_fast((s[k] - state.top) * job.exponent);
            if (hard) sums[1] += exp2_fast((s[k] - state.top) * kLog2E);
            if (logits) sums[2] += exp2_fast((t[k] - state.top_t) * job.exponent);
        }
        group.sum(sums);
        set_sums(job, sums, state);
        if (job.buffers.stats && group.lane == 0) store_state(job, row.row, state);
    }
    float terms[2] = {soft_terms(job, state, s, t), 0.0f};
    float loss = 0.0f;
    if (job.forward) {
        if (hard && call.smoothing != 0.0f) {
#pragma unroll
            for (int k = 0; k < K; ++k)
                if (Columns::column(group.lane, k) < call.classes) terms[1] += s[k];
        }
        group.sum(terms);
        loss = row_loss(job, row, state, terms[0], terms[1]);
    }
    if (row.factor != 0.0f) gradient<Columns>(job, row, state, 0, group.lane, s, t);
    return loss;
}

}  // namespace cuda
}  // namespace kr
