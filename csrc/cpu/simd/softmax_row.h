// What the kernels over rows of two sets of logits share, for the instruction set that foreach_isa.h is compiling. No
// include guard.
#include "cpu/simd/vec_math.h"
#include "cpu/simd/row_io.h"

// p (d + expm1(-d)) with d = ln p - ln q: never negative, no cancellation near d = 0, q alone where p = 0.
KR_FN f32v kl_term(f32v p, f32v q, f32v d) {
    f32v poly = splat(-1.0f / 5040);
    poly = fma(poly, d, splat(1.0f / 720));
    poly = fma(poly, d, splat(-1.0f / 120));
    poly = fma(poly, d, splat(1.0f / 24));
    poly = fma(poly, d, splat(-1.0f / 6));
    poly = fma(poly, d, splat(0.5f));
    const f32v square = d * d, near = p * square * poly;
    const f32v far = max(splat(0.0f), fma(p, d, q - p));  // max gives its second operand where that is NaN
    return p == splat(0.0f) ? q : square < splat(0.0625f) ? near : far;
}

// What e^(z - top) is made of, from the tempered e^((z - top) / T): a power of it where T is 1, 2 or 4, else by itself.
// A template argument, because a choice at run time would cost as much as the power.
constexpr int kNoPower = 0;
template <int kPower>
KR_FN f32v untempered(f32v centred, f32v tempered) {
    if (kPower == kNoPower) return vec_exp(centred);
    const f32v squared = kPower == 1 ? tempered : tempered * tempered;
    return kPower == 4 ? squared * squared : squared;
}

#define KR_EACH_VECTOR(n) for (int64_t i = 0, left = (n); left > 0; i += kLanes, left -= kLanes)

KR_FN f32v take(const float* from, int64_t left, float fill) {
    return left >= kLanes ? load(from) : load_part(from, (int)left, fill);
}
KR_FN void put(float* to, f32v a, int64_t left) {
    if (left >= kLanes)
        store(to, a);
    else
        store_part(to, a, (int)left);
}

static inline float row_max(const float* a, int64_t n) {
    f32v best = splat(-__builtin_inff());
    KR_EACH_VECTOR(n) best = max(take(a + i, left, -__builtin_inff()), best);
    return reduce_max(best);
}

struct Top {
    float value;
    int64_t index;  // the lowest, as torch.argmax; NaN is passed over
};

static inline Top row_top(const float* a, int64_t n) {
    f32v best = splat(-__builtin_inff());
    i32v found = splat_i(0), number = splat_i(0);  // the vector that holds the best of each lane
    KR_EACH_VECTOR(n) {
        const f32v z = take(a + i, left, -__builtin_inff());
        found = z > best ? number : found;
        best = max(z, best);
        number = number + splat_i(1);
    }
    float bests[kLanes];
    int32_t at[kLanes];
    store(bests, best);
    std::memcpy(at, &found, sizeof at);
    Top top{reduce_max(best), n};
    for (int r = 0; r < kLanes; ++r) {
        const int64_t index = (int64_t)at[r] * kLanes + r;
        if (bests[r] == top.value && index < top.index) top.index = index;
    }
    return top;
}

// Blocks of 64 vectors are summed in float and then in double: exact enough for vocabularies, cheap for images.
constexpr int64_t kBlock = 64 * kLanes;
static inline int64_t block_length(int64_t classes, int64_t start) {
    return classes - start < kBlock ? classes - start : kBlock;
}

struct RowSums {
    double tempered = 0, plain = 0, centred = 0;  // of e^((z - top) / T), e^(z - top), z - top
};

// to[i] = e^((from[i] - top) / T). The sums but the first are only taken where asked for.
template <int kPower>
static RowSums exponentials(const float* from, int64_t classes, float top, float T, bool plain, bool centred,
                            float* to) {
    const f32v binary = splat(kLog2E / T), tops = splat(top);
    RowSums sums;
    for (int64_t start = 0; start < classes; start += kBlock) {
        f32v sum = splat(0.0f), sum_1 = splat(0.0f), sum_z = splat(0.0f);
        KR_EACH_VECTOR(block_length(classes, start)) {
            const f32v z = take(from + start + i, left, -__builtin_inff()) - tops, e = vec_exp_scaled(z, binary);
            put(to + start + i, e, left);
            sum = sum + e;
            if (plain) sum_1 = sum_1 + untempered<kPower>(z, e);
            if (centred) sum_z = sum_z + (take(from + start + i, left, top) - tops);
        }
        sums.tempered += reduce_sum(sum), sums.plain += reduce_sum(sum_1), sums.centred += reduce_sum(sum_z);
    }
    return sums;
}
