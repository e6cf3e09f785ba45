// A warp's share of a row in shared memory: how it gets there, and how lanes read it.
#pragma once
#include <type_traits>

#include "cuda/device/cluster.h"
#include "cuda/distillation/distillation_loss_row.h"

namespace kr {
namespace cuda {

constexpr int kVector = 8;  // elements of a row that a lane takes at a time
using Vector = Layout<kVector, 1, 1>;

struct Piece {
    int first, count, lane;   // columns from `first` on; none if the row ends before
    char *student, *teacher;  // in shared memory
    KR_INLINE int vectors() const { return (count + kVector - 1) / kVector; }
};

template <class E>
KR_FN void read_shared(const char* at, uint32_t (&words)[kVector * E::size / 4]) {
#pragma unroll
    for (int k = 0; k < kVector * E::size / 4; k += 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(at + 4 * k);
        words[k] = v.x, words[k + 1] = v.y, words[k + 2] = v.z, words[k + 3] = v.w;
    }
}

template <class E>
KR_FN void read_shared(const char* at, float (&x)[kVector]) {
    uint32_t words[kVector * E::size / 4];
    read_shared<E>(at, words);
    E::expand(words, x);
}

// A dtype that is not known when the kernel is compiled: of teachers that have another one than the student.
struct AnyDtype {};

template <class D>
KR_FN void read_teacher(const DistillationJob& job, const Piece& piece, int v, float (&t)[kVector]) {
    if constexpr (std::is_same_v<D, AnyDtype>)
        with_dtype(job.call.target_dtype, [&](auto dtype) { read_teacher<decltype(dtype)>(job, piece, v, t); });
    else
        read_shared<D>(piece.teacher + v * (kVector * D::size), t);
}

// ---------------------------------------------------------------- a row into shared memory

template <class Word>
KR_FN void copy_by(char* to, const char* from, int bytes, int lane) {
#pragma unroll 8
    for (int at = lane * (int)sizeof(Word); at < bytes; at += 32 * (int)sizeof(Word))
        *reinterpret_cast<Word*>(to + at) = *reinterpret_cast<const Word*>(from + at);
}

KR_FN void copy_piece(char* to, const void* base, int64_t at, int size, int access, const Piece& piece) {
    const char* from = static_cast<const char*>(base) + (at + piece.first) * size;
    if (access >= 8)
        copy_by<uint2>(to, from, piece.count * size, piece.lane);
    else if (access == 4)
        copy_by<uint32_t>(to, from, piece.count * size, piece.lane);
    else
        copy_by<uint16_t>(to, from, piece.count * size, piece.lane);
}

// A piece of a row that is stored as its k largest probabilities, as float32.
KR_FN void spread_topk(const DistillationJob& job, int64_t row, const Piece& piece) {
    const DistillationLoss& call = job.call;
    const int count = (int)call.top_k, others = (int)call.classes - count;
    float sums[1] = {0.0f};
    for (int k = piece.lane; k < count; k += 32)
        sums[0] += read_element(call.target, call.target_dtype, row * call.target_stride + k);
    WarpGroup<32>(piece.lane).sum(sums);
    const float rest = call.smooth_tail && others > 0 && sums[0] < 1.0f ? (1.0f - sums[0]) / (float)others : 0.0f;
    const float scale = call.smooth_tail ? 1.0f : 1.0f / sums[0];
    float* to = reinterpret_cast<float*>(piece.teacher);
    for (int k = piece.lane; k < piece.count; k += 32) to[k] = rest;
    __syncwarp();
    for (int k = piece.lane; k < count; k += 32) {
        const int64_t index = call.indices[row * count + k] - piece.first;
        if (index >= 0 && index < piece.count)
            to[index] = scale * read_element(call.target, call.target_dtype, row * call.target_stride + k);
    }
}

// Whether rows are copied beside the threads: where addresses allow it.
KR_FN bool copies_input(const DistillationJob& job) { return job.input_access >= 16; }
KR_FN bool copies_target(const DistillationJob& job) {
    return job.target_access >= 16 && job.call.soft != 0.0f && !job.call.indices;
}

// Starts the copies of a piece, or makes them.
template <class E>
KR_FN void fetch(const DistillationJob& job, int64_t row, const Piece& piece, uint64_t* arrival) {
    const DistillationLoss& call = job.call;
    if (piece.count == 0) return;
    const bool bulk = copies_input(job), bulk_t = copies_target(job);
    const int size_t_ = call.target_dtype == Dtype::f32 ? 4 : 2;
    const int64_t at = row * call.input_stride, at_t = row * call.target_stride;
    if ((bulk || bulk_t) && piece.lane == 0) {
        const char* from = static_cast<const char*>(call.input) + (at + piece.first) * E::size;
        const char* from_t = static_cast<const char*>(call.target) + (at_t + piece.first) * size_t_;
        const int bytes = piece.count * E::size, bytes_t = piece.count * size_t_;
        before_overwriting();
        expect_copies(arrival, (bulk ? bytes : 0) + (bulk_t ? bytes_t : 0));
        if (bulk) bulk_copy(piece.student, from, bytes, arrival);
        if (bulk_t) bulk_copy(piece.teacher, from_t, bytes_t, arrival);
    }
    if (!bulk) copy_piece(piece.student, call.input, at, E::size, job.input_access, piece);
    if (call.soft != 0.0f && !call.indices && !bulk_t)
        copy_piece(piece.teacher, call.target, at_t, size_t_, job.target_access, piece);
    if (call.soft != 0.0f && call.indices) spread_topk(job, row, piece);
    __syncwarp();
}

// What no copy overwrites: elements of the last vector beyond the row.
template <class E>
KR_FN void fill_piece(const DistillationJob& job, int region, const Piece& piece) {
    const int words = region * E::size / 4;
    for (int k = piece.lane; k < words; k += 32) reinterpret_cast<uint32_t*>(piece.student)[k] = E::minus_inf;
    if (job.call.soft == 0.0f) return;
    auto fill = [&](uint32_t word, int size) {
        for (int k = piece.lane; k < region * size / 4; k += 32) reinterpret_cast<uint32_t*>(piece.teacher)[k] = word;
    };
    if (job.call.target_kind == TargetKind::probs)
        fill(0u, job.call.indices ? 4 : job.call.target_dtype == Dtype::f32 ? 4 : 2);
    else
        with_dtype(job.call.target_dtype, [&](auto dtype) { fill(decltype(dtype)::minus_inf, decltype(dtype)::size); });
}

}  // namespace cuda
}  // namespace kr
