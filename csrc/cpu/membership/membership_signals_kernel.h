// Included once per instruction set by membership_signals.cpp.
//
// Up to kLaneClasses classes a vector holds the same class of kLanes rows, transposed on the way in; above that kLanes
// classes of one row. One exponential a logit in both: w_j = e^(z_j - second), with `second` the largest logit but the
// first of the largest. Times k = e^(second - top) it is e^(z_j - top), which may underflow where w_j does not.
#include "cpu/simd/softmax_row.h"

constexpr int64_t kLaneClasses = 128;  // two arrays of kLanes x 128 floats stay in L1

// What the sums over the classes come to, for one row or kLanes of them. `first` is the index of `top`.
struct RowParts {
    f32v z_y, top, second;
    f32v rest;      // sum of w_j, j != first
    f32v unlike;    // sum of w_j, j != first and j != label
    f32v weighted;  // sum of w_j (z_j - second), j != first
};

// The signals but modified_entropy's sum over the classes.
struct RowSignals {
    f32v phi, loss, entropy, inverse, sum, k, complement_y;
    f32v surprise;  // -ln(1 - p_first)
};

// Scale of w: where every class but one is ruled out, top, so that no infinity is subtracted from itself.
KR_FN f32v base_of(f32v top, f32v second) { return second == splat(-__builtin_inff()) ? top : second; }

KR_FN RowSignals signals_of(const RowParts& row, i32v label_is_first) {
    const f32v zero = splat(0.0f), one = splat(1.0f), inf = splat(__builtin_inff());
    const f32v base = base_of(row.top, row.second), gap = base - row.top;
    const auto hit = label_is_first != splat_i(0);
    RowSignals out;
    out.k = vec_exp(gap);
    out.sum = fma(out.k, row.rest, one);
    out.inverse = one / out.sum;
    // The rivals of a label that is first are summed on the scale of the second, else on that of the first.
    const f32v sure = row.z_y - row.second - vec_log(row.rest);
    const f32v other = row.z_y - row.top - vec_log(fma(out.k, row.unlike, one));
    const f32v alone = row.second == -inf ? inf : sure;  // no rival: the label is certain
    out.phi = hit ? alone : other;
    // -ln p_y = ln(1 + e^-phi) = max(-phi, 0) + log1p(e^-|phi|) keeps its digits where p_y is near 1; log1p(s) as
    // ln(u) s / (u - 1) with u = fl(1 + s), whose rounding cancels.
    const f32v s = vec_exp(out.phi > zero ? -out.phi : out.phi), u = one + s;
    out.loss = max(-out.phi, zero) + (u == one ? s : vec_log(u) * s / (u - one));
    const f32v log_sum = vec_log(out.sum);
    out.entropy = log_sum - out.k * fma(gap, row.rest, row.weighted) * out.inverse;
    const f32v p_rest = out.k * row.rest * out.inverse;
    out.complement_y = hit ? p_rest : one - vec_exp(row.z_y - row.top) * out.inverse;
    out.surprise = row.second == -inf ? inf : log_sum - gap - vec_log(row.rest);
    return out;
}

// -p ln(1 - p) of a class that is not the first: p is at most 1/2.
KR_FN f32v modified_term(f32v w, const RowSignals& row) {
    const f32v e = w * row.k;
    return e * row.inverse * -vec_log((row.sum - e) * row.inverse);
}

// -(1 - p_y) ln p_y - sum_{j != y} p_j ln(1 - p_j), where only p_first can be near 1: its complement is summed from the
// other classes, so that it neither cancels nor underflows. `terms` is the sum over j != y, j != first.
KR_FN f32v modified_of(const RowSignals& row, i32v label_is_first, f32v terms) {
    const f32v total = fma(row.complement_y, row.loss, terms), first = row.inverse * row.surprise;
    return label_is_first != splat_i(0) ? total : total + first;
}

// ---------------------------------------------------------------- one class a vector, kLanes rows

static void write_lanes(float* to, int64_t row, int count, f32v value) {
    if (to) store_part(to + row, value, count);
}

static const float* logits_of(const MembershipSignals& call, int64_t row) {
    return static_cast<const float*>(call.logits) + row * call.stride;
}

static void signals_lanes(const MembershipSignals& call, int64_t row, int count) {
    const SignalOutputs& out = call.out;
    const int classes = (int)call.classes;
    alignas(64) float lanes[kLaneClasses * kLanes];
    f32v w[kLaneClasses];
    const float* rows[kLanes];  // the last of `count` rows is repeated
    float label_lanes[kLanes], y_lanes[kLanes];
    for (int r = 0; r < kLanes; ++r) {
        const int64_t at = row + (r < count ? r : count - 1);
        const int64_t label = call.labels[at];
        rows[r] = logits_of(call, at);
        label_lanes[r] = (float)label, y_lanes[r] = rows[r][label];
    }
    load_lanes(rows, classes, lanes);
    const f32v zero = splat(0.0f), one = splat(1.0f), minus_inf = splat(-__builtin_inff()), label = load(label_lanes);
    RowParts parts{load(y_lanes), minus_inf, minus_inf, zero, zero, zero};
    f32v first = splat(-1.0f), index = zero;
    for (int j = 0; j < classes; ++j, index = index + one) {
        const f32v z = load(lanes + j * kLanes);
        first = z > parts.top ? index : first;
        parts.second = max(parts.second, min(z, parts.top));
        parts.top = max(z, parts.top);
    }
    const f32v base = base_of(parts.top, parts.second);
    index = zero;
    for (int j = 0; j < classes; ++j, index = index + one) {
        const f32v shifted = load(lanes + j * kLanes) - base, e = vec_exp(first == index ? minus_inf : shifted);
        w[j] = e;
        parts.rest = parts.rest + e;
        parts.unlike = parts.unlike + (label == index ? zero : e);
        parts.weighted = parts.weighted + (e == zero ? zero : e * shifted);
    }
    const i32v hit = first == label ? splat_i(1) : splat_i(0);
    const RowSignals signals = signals_of(parts, hit);
    write_lanes(out.phi, row, count, signals.phi);
    write_lanes(out.loss, row, count, signals.loss);
    write_lanes(out.entropy, row, count, signals.entropy);
    write_lanes(out.confidence, row, count, vec_exp(-signals.loss));
    write_lanes(out.correct, row, count, first == label ? one : zero);
    if (!out.modified_entropy) return;
    f32v terms = zero;
    index = zero;
    for (int j = 0; j < classes; ++j, index = index + one)
        terms = terms + (label == index ? zero : modified_term(w[j], signals));
    write_lanes(out.modified_entropy, row, count, modified_of(signals, hit, terms));
}

// ---------------------------------------------------------------- kLanes classes a vector, one row

static inline float first_lane(f32v a) {
    float out;
    std::memcpy(&out, &a, sizeof out);
    return out;
}
static inline void write_one(float* to, int64_t row, float value) {
    if (to) to[row] = value;
}

// w: `classes` floats.
static void signals_row(const MembershipSignals& call, int64_t row, float* w) {
    const SignalOutputs& out = call.out;
    const float* z = logits_of(call, row);
    const int64_t classes = call.classes, label = call.labels[row];
    const float minus_inf = -__builtin_inff();
    const auto [top, first] = row_top(z, classes);
    const float before = row_max(z, first), after = row_max(z + first + 1, classes - first - 1);
    const float second = before > after ? before : after;
    const f32v base = base_of(splat(top), splat(second));
    double rest = 0, weighted = 0;
    for (int64_t start = 0; start < classes; start += kBlock) {
        f32v sum = splat(0.0f), sum_w = splat(0.0f);
        KR_EACH_VECTOR(block_length(classes, start)) {
            const int64_t at = start + i;
            f32v shifted = take(z + at, left, minus_inf) - base;
            if (first - at >= 0 && first - at < kLanes) {  // the first is left out
                float lanes[kLanes];
                store(lanes, shifted);
                lanes[first - at] = minus_inf;
                shifted = load(lanes);
            }
            const f32v e = vec_exp(shifted);
            put(w + at, e, left);
            sum = sum + e;
            sum_w = sum_w + (e == splat(0.0f) ? splat(0.0f) : e * shifted);
        }
        rest += reduce_sum(sum), weighted += reduce_sum(sum_w);
    }
    RowParts parts{
        splat(z[label]),       splat(top), splat(second), splat((float)rest), splat((float)(rest - w[label])),
        splat((float)weighted)};
    const i32v hit = splat_i(first == label);
    const RowSignals signals = signals_of(parts, hit);
    write_one(out.phi, row, first_lane(signals.phi));
    write_one(out.loss, row, first_lane(signals.loss));
    write_one(out.entropy, row, first_lane(signals.entropy));
    write_one(out.confidence, row, first_lane(vec_exp(-signals.loss)));
    write_one(out.correct, row, first == label ? 1.0f : 0.0f);
    if (!out.modified_entropy) return;
    w[label] = 0.0f;
    double terms = 0;
    for (int64_t start = 0; start < classes; start += kBlock) {
        f32v sum = splat(0.0f);
        KR_EACH_VECTOR(block_length(classes, start))
        sum = sum + modified_term(take(w + start + i, left, 0.0f), signals);
        terms += reduce_sum(sum);
    }
    write_one(out.modified_entropy, row, first_lane(modified_of(signals, hit, splat((float)terms))));
}
#undef KR_EACH_VECTOR

// Rows [row, row + count); work holds `classes` floats above kLaneClasses.
static void signals_block(const MembershipSignals& call, int64_t row, int64_t count, float* work) {
    if (call.classes > kLaneClasses) {
        for (int64_t r = row; r < row + count; ++r) signals_row(call, r, work);
        return;
    }
    for (int64_t r = 0; r < count; r += kLanes)
        signals_lanes(call, row + r, (int)(count - r < kLanes ? count - r : kLanes));
}
