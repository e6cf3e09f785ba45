// Included once per instruction set by optimizer_step.cpp.
//
// What limits a step is the number of trips to memory, so an element is read and written once, whatever the update is
// made of. Five arrays at a time are more than the processor's own prefetching keeps up with, above all where a page
// ends: asking for lines ahead takes a sixth off the time of a step on one thread.

constexpr int64_t kAhead = 512;  // elements; the best of 128 to 2048

KR_FN void ahead(const float* from) { __builtin_prefetch(from + kAhead); }

static double squares_of(const float* x, int64_t n) {
    f32v sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) KR_UNROLL for (int v = 0; v < 4; ++v) {
            ahead(x + i + v * kLanes);
            const f32v a = load(x + i + v * kLanes);
            sum[v] = fma(a, a, sum[v]);
        }
    for (; i < n; i += kLanes) {
        const f32v a = n - i < kLanes ? load_part(x + i, (int)(n - i), 0.0f) : load(x + i);
        sum[0] = fma(a, a, sum[0]);
    }
    return (double)reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// A vector of an array, or its first `live` lanes.
template <bool whole>
KR_FN f32v read(const float* from, int live) {
    if (whole) ahead(from);
    return whole ? load(from) : load_part(from, live, 0.0f);
}
template <bool whole>
KR_FN void write(float* to, f32v a, int live) {
    whole ? store(to, a) : store_part(to, a, live);
}

template <OptimizerRule rule, bool average, bool whole>
KR_FN void step_vector(const OptimizerTensor& t, const OptimizerScalars& s, int64_t i, int live) {
    f32v p = read<whole>(t.parameter + i, live);
    if (rule != OptimizerRule::none) {
        f32v g = read<whole>(t.grad + i, live) * splat(s.clip);
        if (rule == OptimizerRule::adamw) {
            f32v m = read<whole>(t.first + i, live), v = read<whole>(t.second + i, live);
            m = fma(g - m, splat(s.first), m);
            v = fma(g * g, splat(s.second), v * splat(s.kept));
            p = p * splat(s.decay) - splat(s.rate) * m / fma(sqrt(v), splat(s.scale), splat(s.eps));
            write<whole>(t.first + i, m, live);
            write<whole>(t.second + i, v, live);
        } else {
            g = fma(p, splat(s.decay), g);
            if (rule != OptimizerRule::plain) {
                const f32v m = fma(read<whole>(t.first + i, live), splat(s.first), g);
                write<whole>(t.first + i, m, live);
                g = rule == OptimizerRule::nesterov ? fma(m, splat(s.first), g) : m;
            }
            p = fma(g, splat(-s.rate), p);
        }
        write<whole>(t.parameter + i, p, live);
    }
    if (average) {
        const f32v mean = read<whole>(t.average + i, live);
        write<whole>(t.average + i, fma(mean - p, splat(-s.average), mean), live);
    }
}

template <OptimizerRule rule, bool average>
static void step_run(const OptimizerTensor& t, const OptimizerScalars& s, int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) step_vector<rule, average, true>(t, s, i, kLanes);
    if (i < end) step_vector<rule, average, false>(t, s, i, (int)(end - i));
}

template <OptimizerRule rule>
static void step_run_of(const OptimizerTensor& t, const OptimizerScalars& s, int64_t begin, int64_t end) {
    t.average ? step_run<rule, true>(t, s, begin, end) : step_run<rule, false>(t, s, begin, end);
}

static void step_numbers(const OptimizerTensor& t, const OptimizerScalars& s, int64_t begin, int64_t end) {
    switch (s.rule) {
        case OptimizerRule::none:
            return step_run_of<OptimizerRule::none>(t, s, begin, end);
        case OptimizerRule::plain:
            return step_run_of<OptimizerRule::plain>(t, s, begin, end);
        case OptimizerRule::momentum:
            return step_run_of<OptimizerRule::momentum>(t, s, begin, end);
        case OptimizerRule::nesterov:
            return step_run_of<OptimizerRule::nesterov>(t, s, begin, end);
        case OptimizerRule::adamw:
            return step_run_of<OptimizerRule::adamw>(t, s, begin, end);
    }
}
