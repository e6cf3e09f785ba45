// Included once per instruction set by membership_signals.cpp: a vector holds one class of kLanes rows.
#include "cpu/vec_math.h"

KR_FN f32v class_of_rows(const float* logits, int64_t stride, int64_t row, int count, int64_t j) {
    float lanes[kLanes];
    for (int r = 0; r < kLanes; ++r) lanes[r] = logits[(row + (r < count ? r : count - 1)) * stride + j];
    return load(lanes);
}

static void write_lanes(float* to, int64_t row, int count, f32v value) {
    if (to) store_part(to + row, value, count);
}

static void signals_block(const float* logits, int64_t classes, int64_t stride, const int64_t* labels, int64_t row,
                          int count, const SignalOutputs& out) {
    float label_lanes[kLanes], y_lanes[kLanes];
    for (int r = 0; r < kLanes; ++r) {
        const int64_t at = row + (r < count ? r : count - 1);
        label_lanes[r] = (float)labels[at];
        y_lanes[r] = logits[at * stride + labels[at]];
    }
    const f32v label = load(label_lanes), z_y = load(y_lanes), minus_inf = splat(-__builtin_inff());
    // first: the index of the top logit; second: the largest logit but that one; rival: the largest but the label's.
    f32v top = minus_inf, second = minus_inf, rival = minus_inf, first = splat(-1.0f);
    for (int64_t j = 0; j < classes; ++j) {
        f32v z = class_of_rows(logits, stride, row, count, j), index = splat((float)j);
        first = z > top ? index : first;
        second = max(second, min(z, top));
        top = max(z, top);
        rival = max(label == index ? minus_inf : z, rival);
    }
    f32v others = splat(0.0f), sum = splat(0.0f), rest = splat(0.0f), weighted = splat(0.0f);
    for (int64_t j = 0; j < classes; ++j) {
        f32v z = class_of_rows(logits, stride, row, count, j), index = splat((float)j), e = vec_exp(z - top);
        others = others + (label == index ? splat(0.0f) : vec_exp(z - rival));
        sum = sum + e;
        rest = rest + (first == index ? splat(0.0f) : e);
        weighted = weighted + (e == splat(0.0f) ? splat(0.0f) : e * (z - top));
    }
    // All rivals at -inf: the label is certain.
    f32v phi = rival == minus_inf ? splat(__builtin_inff()) : z_y - rival - vec_log(others);
    const f32v log_sum = vec_log(sum), inverse = splat(1.0f) / sum;
    // -ln p_y = ln(1 + e^-phi) = max(-phi, 0) + log1p(e^-|phi|) keeps its digits where p_y is near 1; log1p(s) as
    // ln(u) s / (u - 1) with u = fl(1 + s), whose rounding cancels.
    const f32v zero = splat(0.0f), one = splat(1.0f);
    const f32v s = vec_exp(phi > zero ? -phi : phi), u = one + s;
    f32v loss = max(-phi, zero) + (u == one ? s : vec_log(u) * s / (u - one));
    write_lanes(out.phi, row, count, phi);
    write_lanes(out.loss, row, count, loss);
    write_lanes(out.entropy, row, count, log_sum - weighted * inverse);
    write_lanes(out.confidence, row, count, vec_exp(-loss));
    write_lanes(out.correct, row, count, first == label ? splat(1.0f) : splat(0.0f));
    if (!out.modified_entropy) return;
    // -(1 - p_y) ln p_y - sum_{j != y} p_j ln(1 - p_j), where only p_first can be near 1. Its complement is summed from
    // the other classes on the scale of the second largest, so that it neither cancels nor underflows.
    f32v complement_y = first == label ? rest * inverse : one - vec_exp(z_y - top) * inverse;
    f32v total = complement_y * loss, rest_scaled = zero;
    for (int64_t j = 0; j < classes; ++j) {
        f32v index = splat((float)j), z = class_of_rows(logits, stride, row, count, j), e = vec_exp(z - top);
        f32v term = e * inverse * -vec_log((sum - e) * inverse);
        total = total + (label == index ? zero : first == index ? zero : term);
        rest_scaled = rest_scaled + (first == index ? zero : vec_exp(z - second));
    }
    f32v surprise = second == minus_inf ? splat(__builtin_inff()) : log_sum + top - second - vec_log(rest_scaled);
    total = total + (first == label ? zero : inverse * surprise);
    write_lanes(out.modified_entropy, row, count, total);
}
