// Sums and terms of the common case, the plain divergence between logits, with as few instructions an element as its
// accuracy allows, because they and not memory bound it.
#pragma once
#include "cuda/distillation/distillation_loss_piece.h"

namespace kr {
namespace cuda {

// Maxima of a piece and sums of 2^(z * exponent - offset_of(maximum)): what is left of it for the other warps.
struct PieceSums {
    float top = -INFINITY, top_t = -INFINITY, sum = 0.0f, sum_1 = 0.0f, sum_t = 0.0f;
};

// A product and not a difference of z and the maximum: fma(z, exponent, -offset) is then one instruction, rounded once.
// That the offset is rounded does not matter, for numerator and denominator have the same.
KR_FN float offset_of(float top, float exponent) { return top == -INFINITY ? 0.0f : mul(top, exponent); }

#ifdef __CUDACC__
KR_FN float most_or_nan(float a, float b) {
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}
KR_FN uint32_t most_of(F32, uint32_t a, uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
}
KR_FN uint32_t most_of(BF16, uint32_t a, uint32_t b) {
    uint32_t out;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}
KR_FN uint32_t most_of(F16, uint32_t a, uint32_t b) {
    uint32_t out;
    asm("max.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}
#else
KR_FN float most_or_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }
template <class E>
KR_FN uint32_t most_of(E, uint32_t a, uint32_t b) {
    constexpr int kEach = 4 / E::size;
    const uint32_t words_a[1] = {a}, words_b[1] = {b};
    float x[kEach], y[kEach];
    uint32_t out[1];
    E::expand(words_a, x), E::expand(words_b, y);
    for (int k = 0; k < kEach; ++k) x[k] = fmaxf(x[k], y[k]);
    E::pack(x, out);
    return out[0];
}
#endif

// The maximum of a lane's vectors.
template <class E>
KR_FN float most_of_piece(const char* base, const Piece& piece) {
    constexpr int kEach = 4 / E::size;
    uint32_t most[1] = {E::minus_inf};
    for (int v = piece.lane; v < piece.vectors(); v += 32) {
        uint32_t words[kVector * E::size / 4];
        read_shared<E>(base + v * (kVector * E::size), words);
#pragma unroll
        for (uint32_t word : words) most[0] = most_of(E(), most[0], word);
    }
    float x[kEach];
    E::expand(most, x);
    return kEach == 1 ? x[0] : fmaxf(x[0], x[kEach - 1]);
}

template <class D>
KR_FN float most_of_teacher(const DistillationJob& job, const Piece& piece) {
    if constexpr (std::is_same_v<D, AnyDtype>) {
        float most = -INFINITY;
        with_dtype(job.call.target_dtype,
                   [&](auto dtype) { most = most_of_piece<decltype(dtype)>(piece.teacher, piece); });
        return most;
    } else {
        return most_of_piece<D>(piece.teacher, piece);
    }
}

// Maxima of the warp, sums of the lane. E, D: elements of student and teacher.
template <class E, class D>
KR_FN void plain_sums(const DistillationJob& job, const Piece& piece, PieceSums& out) {
    float tops[2] = {most_of_piece<E>(piece.student, piece), most_of_teacher<D>(job, piece)};
    WarpGroup<32>(piece.lane).max(tops);
    out.top = tops[0], out.top_t = tops[1];
    const float offset = offset_of(tops[0], job.exponent), offset_t = offset_of(tops[1], job.exponent);
    const float offset_1 = offset_of(tops[0], kLog2E), T = job.call.temperature;
    // e^z from e^(z / T) where T is 1, 2 or 4.
    const int squarings = T == 1.0f ? 0 : T == 2.0f ? 1 : T == 4.0f ? 2 : -1;
    const bool hard = job.call.hard != 0.0f;
    float sum[2] = {}, sum_t[2] = {}, sum_1[2] = {};
    for (int v = piece.lane; v < piece.vectors(); v += 32) {
        float s[kVector], t[kVector], e[kVector];
        read_shared<E>(piece.student + v * (kVector * E::size), s);
        read_teacher<D>(job, piece, v, t);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
            sum[k % 2] += e[k] = exp2_fast(fma(s[k], job.exponent, -offset));
            sum_t[k % 2] += exp2_fast(fma(t[k], job.exponent, -offset_t));
        }
        if (!hard || squarings == 0) continue;
        if (squarings < 0) {
#pragma unroll
            for (int k = 0; k < kVector; ++k) sum_1[k % 2] += exp2_fast(fma(s[k], kLog2E, -offset_1));
        } else if (squarings == 1) {
#pragma unroll
            for (int k = 0; k < kVector; ++k) sum_1[k % 2] = fma(e[k], e[k], sum_1[k % 2]);
        } else {
#pragma unroll
            for (int k = 0; k < kVector; ++k) e[k] *= e[k], sum_1[k % 2] = fma(e[k], e[k], sum_1[k % 2]);
        }
    }
    out.sum = sum[0] + sum[1], out.sum_t = sum_t[0] + sum_t[1];
    out.sum_1 = squarings == 0 ? out.sum : sum_1[0] + sum_1[1];
}

// What the terms need of a row, the teacher's sum being the unit of all probabilities.
struct PlainRow {
    float offset, offset_t, offset_1;
    float ratio, shift;        // teacher's sum / student's, and its log2
    float scale_t;             // 1 / teacher's sum
    float soft, hard, smooth;  // the gradient is soft * difference + hard * e^z - smooth
    float on;                  // and this less at the label
};

KR_FN PlainRow plain_row(const DistillationJob& job, const DistillationRow& row, const PieceSums& sums) {
    const DistillationLoss& call = job.call;
    PlainRow out;
    out.offset = offset_of(sums.top, job.exponent), out.offset_t = offset_of(sums.top_t, job.exponent);
    out.offset_1 = offset_of(sums.top, kLog2E);
    out.ratio = sums.sum_t / sums.sum, out.shift = logf(out.ratio) * kLog2E;
    out.scale_t = 1.0f / sums.sum_t;
    out.soft = row.factor * (call.soft * call.temperature) * out.scale_t;
    const float hard = row.factor * call.hard;
    out.hard = hard != 0.0f ? hard / sums.sum_1 : 0.0f;
    out.smooth = hard * (call.smoothing / (float)call.classes), out.on = hard * (1.0f - call.smoothing);
    return out;
}

// f(d) / (d^2 ln^2 2) with f(d) = d + expm1(-d), d in units of log2: |d ln 2| < 1/4, relative error 3e-8.
KR_FN float series(float d) {
    float out = fma(d, 1.5410688e-4f, -1.3358367e-3f);
    out = fma(d, out, 9.6181408e-3f);
    out = fma(d, out, -5.5504028e-2f);
    return fma(d, out, 2.4022651e-1f);
}

// Gradient and terms of the vectors of a piece from `v` on. Without kExact logits must be finite and vectors whole;
// `kl` is NaN if the former are not. With it a probability of 0 is known, and what is beyond the row.
template <class E, class D, bool kExact>
KR_FN void plain_terms(const DistillationJob& job, const DistillationRow& row, const PlainRow& of, const Piece& piece,
                       int v, float top, float& kl, float& centred) {
    constexpr float kNear = 0.36067376f;
    const int classes = (int)job.call.classes, end = kExact ? piece.vectors() : piece.count / kVector;
    const int64_t at = row.row * job.call.classes;
    const bool hard = of.hard != 0.0f, smoothed = job.call.smoothing != 0.0f && job.call.hard != 0.0f;
    float sum[2] = {};
    for (; v < end; v += 32) {
        const int first = piece.first + v * kVector;
        float s[kVector], t[kVector];
        read_shared<E>(piece.student + v * (kVector * E::size), s);
        read_teacher<D>(job, piece, v, t);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
            const float u = fma(s[k], job.exponent, -of.offset), w = fma(t[k], job.exponent, -of.offset_t);
            const float e = exp2_fast(u), p = exp2_fast(w), d = (w - u) - of.shift;
            const float pd = mul(p, d), difference = fma(e, of.ratio, -p);
            const float near = mul(mul(pd, d), series(d)), far = most_or_nan(fma(pd, kLn2, difference), 0.0f);
            const bool is_near = fabsf(d) < kNear, is_zero = kExact && p == 0.0f;
            sum[k % 2] += is_zero ? difference : is_near ? near : far;
            t[k] = !is_zero && is_near ? fma(pd, -kLn2, near) : difference;
        }
        if (smoothed)
#pragma unroll
            for (int k = 0; k < kVector; ++k)
                if (!kExact || first + k < classes) centred += s[k] - top;
        if (!job.buffers.grad) continue;
        const int index = row.label - first;
        if (!hard) {
#pragma unroll
            for (int k = 0; k < kVector; ++k) t[k] *= of.soft;
        } else {
#pragma unroll
            for (int k = 0; k < kVector; ++k) {
                const float e = exp2_fast(fma(s[k], kLog2E, -of.offset_1));
                t[k] = fma(t[k], of.soft, fma(e, of.hard, -of.smooth));
            }
            if (index >= 0 && index < kVector)
#pragma unroll
                for (int k = 0; k < kVector; ++k) t[k] -= k == index ? of.on : 0.0f;
        }
        if (row.factor == 0.0f)
#pragma unroll
            for (int k = 0; k < kVector; ++k) t[k] = 0.0f;
        write_row<E, kVector, 1, 1>(job.buffers.grad, at, job.grad_access, first, classes, 0, t);
    }
    kl += (sum[0] + sum[1]) * of.scale_t;
}

}  // namespace cuda
}  // namespace kr
