// Included once per instruction set by distillation_metrics.cpp.
//
// Two layouts, as for the loss: up to kLaneClasses classes a vector holds the same class of kLanes rows, above that
// kLanes classes of one row. Both take every exponential once: e^(z - top) is a power of e^((z - top) / T) where T is
// 1, 2 or 4, and the teacher's entropy is summed where its exponentials are.
#include "cpu/simd/softmax_row.h"

constexpr int kLaneClasses = 128;
constexpr int kGroup = 16;  // exponentials summed at a time, as in the loss

// 0 where e is, also for a class that is ruled out (z = -inf).
KR_FN f32v entropy_term(f32v e, f32v centred) { return e == splat(0.0f) ? splat(0.0f) : e * centred; }

// The entropy ln D - A / D of terms that sum to A and exponentials that sum to D >= 1, never below 0.
static inline float entropy_of(double sum, double weighted) {
    const float entropy = (float)(__builtin_log(sum) - weighted / sum);
    return entropy < 0.0f ? 0.0f : entropy;  // NaN passes
}

// ---------------------------------------------------------------- one class a vector, kLanes rows

struct LaneTop {
    f32v value, index;  // the lowest, as torch.argmax
};

KR_FN LaneTop lane_top(const float* lanes, int classes) {
    LaneTop top{load(lanes), splat(0.0f)};
    f32v index = splat(1.0f);
    for (int j = 1; j < classes; ++j, index = index + splat(1.0f)) {
        const f32v z = load(lanes + j * kLanes);
        top.index = z > top.value ? index : top.index;
        top.value = max(z, top.value);
    }
    return top;
}

template <int kPower>
static void metrics_lanes(const DistillationMetrics& call, int64_t row, int count) {
    const int classes = (int)call.classes;
    const float T = call.temperature;
    const f32v binary = splat(kLog2E / T), inverse_t = splat(1.0f / T), zero = splat(0.0f), one = splat(1.0f);
    alignas(64) float s_lanes[kLaneClasses * kLanes], t_lanes[kLaneClasses * kLanes], scratch[kLaneClasses * kLanes];
    f32v es[kLaneClasses], et[kLaneClasses];
    const float* rows[kLanes];  // the last of `count` rows is repeated
    float picked[kLanes] = {}, labels[kLanes] = {};
    for (int r = 0; r < kLanes; ++r)
        rows[r] = r < count ? to_float_row(call.input, call.input_dtype, (row + r) * call.input_stride, classes,
                                           scratch + r * classes)
                            : rows[r - 1];
    load_lanes(rows, classes, s_lanes);
    for (int r = 0; call.labels && r < count; ++r) {
        const int64_t label = call.labels[row + r];
        const bool counts = label >= 0 && label < classes;
        labels[r] = counts ? (float)label : -1.0f;
        picked[r] = rows[r][counts ? label : 0];
    }
    for (int r = 0; r < kLanes; ++r)
        rows[r] = r < count ? to_float_row(call.target, call.target_dtype, (row + r) * call.target_stride, classes,
                                           scratch + r * classes)
                            : rows[r - 1];
    load_lanes(rows, classes, t_lanes);
    const LaneTop top_s = lane_top(s_lanes, classes), top_t = lane_top(t_lanes, classes);
    f32v sum_s = zero, sum_1 = zero, sum_t = zero, sum_t1 = zero, weighted = zero;
    for (int from = 0; from < classes; from += kGroup) {
        f32v part_s = zero, part_1 = zero, part_t = zero, part_t1 = zero, part_w = zero;
        for (int j = from; j < classes && j < from + kGroup; ++j) {
            const f32v c_s = load(s_lanes + j * kLanes) - top_s.value, c_t = load(t_lanes + j * kLanes) - top_t.value;
            es[j] = vec_exp_scaled(c_s, binary), et[j] = vec_exp_scaled(c_t, binary);
            const f32v e = untempered<kPower>(c_t, et[j]);
            part_s = part_s + es[j], part_t = part_t + et[j], part_t1 = part_t1 + e;
            if (call.labels) part_1 = part_1 + untempered<kPower>(c_s, es[j]);
            part_w = part_w + entropy_term(e, c_t);
            store(t_lanes + j * kLanes, c_t - c_s);
        }
        sum_s = sum_s + part_s, sum_1 = sum_1 + part_1, sum_t = sum_t + part_t, sum_t1 = sum_t1 + part_t1;
        weighted = weighted + part_w;
    }
    const f32v scale_s = one / sum_s, scale_t = one / sum_t, shift = vec_log(sum_t / sum_s);
    f32v kl = zero;
    for (int j = 0; j < classes; ++j)
        kl = kl + kl_term(et[j] * scale_t, es[j] * scale_s, load(t_lanes + j * kLanes) * inverse_t - shift);
    const f32v entropy = vec_log(sum_t1) - weighted / sum_t1, label = load(labels);
    store_part(call.kl + row, splat(T * T) * kl, count);
    store_part(call.teacher_confidence + row, one / sum_t1, count);
    store_part(call.teacher_entropy + row, entropy < zero ? zero : entropy, count);
    float first_s[kLanes], first_t[kLanes];
    store(first_s, top_s.index), store(first_t, top_t.index);
    for (int r = 0; r < count; ++r) call.agreement[row + r] = first_s[r] == first_t[r];
    if (!call.labels) return;
    const f32v cross = vec_log(sum_1) - (load(picked) - top_s.value);
    store_part(call.cross_entropy + row, label < zero ? zero : cross, count);
    for (int r = 0; r < count; ++r) {
        call.student_correct[row + r] = first_s[r] == labels[r];
        call.teacher_correct[row + r] = first_t[r] == labels[r];
    }
}

// ---------------------------------------------------------------- kLanes classes a vector, one row

struct TeacherSums {
    double tempered = 0, plain = 0, weighted = 0;  // the last: of e^(z - top) (z - top)
};

template <int kPower>
static TeacherSums teacher_sums(const float* from, int64_t classes, float top, float T, float* to) {
    const f32v binary = splat(kLog2E / T), tops = splat(top);
    TeacherSums sums;
    for (int64_t start = 0; start < classes; start += kBlock) {
        f32v sum = splat(0.0f), sum_1 = splat(0.0f), sum_w = splat(0.0f);
        KR_EACH_VECTOR(block_length(classes, start)) {
            const f32v z = take(from + start + i, left, -__builtin_inff()) - tops, tempered = vec_exp_scaled(z, binary);
            const f32v e = untempered<kPower>(z, tempered);
            put(to + start + i, tempered, left);
            sum = sum + tempered, sum_1 = sum_1 + e, sum_w = sum_w + entropy_term(e, z);
        }
        sums.tempered += reduce_sum(sum), sums.plain += reduce_sum(sum_1), sums.weighted += reduce_sum(sum_w);
    }
    return sums;
}

// work: 4 * classes floats.
template <int kPower>
static void metrics_row(const DistillationMetrics& call, int64_t row, float* work) {
    const int64_t n = call.classes;
    const float T = call.temperature, minus_inf = -__builtin_inff();
    float *es = work, *et = work + n;
    const float* s = to_float_row(call.input, call.input_dtype, row * call.input_stride, n, work + 2 * n);
    const float* t = to_float_row(call.target, call.target_dtype, row * call.target_stride, n, work + 3 * n);
    const Top top_s = row_top(s, n), top_t = row_top(t, n);
    const RowSums sums_s = exponentials<kPower>(s, n, top_s.value, T, call.labels, false, es);
    const TeacherSums sums_t = teacher_sums<kPower>(t, n, top_t.value, T, et);
    const f32v scale_s = splat(1.0f / (float)sums_s.tempered), scale_t = splat(1.0f / (float)sums_t.tempered);
    const f32v shift = splat((float)__builtin_log(sums_t.tempered / sums_s.tempered)), inverse_t = splat(1.0f / T);
    double kl = 0;
    for (int64_t start = 0; start < n; start += kBlock) {
        f32v block = splat(0.0f);
        KR_EACH_VECTOR(block_length(n, start)) {
            const f32v c_s = take(s + start + i, left, minus_inf) - splat(top_s.value);
            const f32v c_t = take(t + start + i, left, minus_inf) - splat(top_t.value);
            const f32v q = take(es + start + i, left, 0.0f) * scale_s, p = take(et + start + i, left, 0.0f) * scale_t;
            block = block + kl_term(p, q, (c_t - c_s) * inverse_t - shift);
        }
        kl += reduce_sum(block);
    }
    call.kl[row] = (float)((double)T * T * kl);
    call.teacher_confidence[row] = (float)(1.0 / sums_t.plain);
    call.teacher_entropy[row] = entropy_of(sums_t.plain, sums_t.weighted);
    call.agreement[row] = top_s.index == top_t.index;
    if (!call.labels) return;
    const int64_t label = call.labels[row];
    const bool counts = label >= 0 && label < n;
    call.cross_entropy[row] = counts ? (float)(__builtin_log(sums_s.plain) - ((double)s[label] - top_s.value)) : 0.0f;
    call.student_correct[row] = top_s.index == label, call.teacher_correct[row] = top_t.index == label;
}
#undef KR_EACH_VECTOR

// ---------------------------------------------------------------- a block of rows

template <int kPower>
static void metrics_block_of(const DistillationMetrics& call, int64_t begin, int64_t end, float* work) {
    if (call.classes > kLaneClasses)
        for (int64_t row = begin; row < end; ++row) metrics_row<kPower>(call, row, work);
    else
        for (int64_t row = begin; row < end; row += kLanes)
            metrics_lanes<kPower>(call, row, (int)(end - row < kLanes ? end - row : kLanes));
}

// work: 4 * classes floats above kLaneClasses.
static void metrics_block(const DistillationMetrics& call, int64_t begin, int64_t end, float* work) {
    const float T = call.temperature;
    if (T == 1.0f)
        metrics_block_of<1>(call, begin, end, work);
    else if (T == 2.0f)
        metrics_block_of<2>(call, begin, end, work);
    else if (T == 4.0f)
        metrics_block_of<4>(call, begin, end, work);
    else
        metrics_block_of<kNoPower>(call, begin, end, work);
}
