#include "cpu/nn/batch_norm_act.h"

#include <memory>

#include "cpu/simd/parallel.h"

namespace kr {

// How rows of channels are cut, by their shape alone, so that no sum depends on the number of threads. Rows are taken
// together as a line of whole vectors: 16 rows of 1 channel, 4 rows of 16. A chunk is a few lines, which fit L1; rows
// that fill no line are a chunk of their own. Partial results of a chunk are arrays of `room` floats.
struct NormLines {
    int64_t channels, width, room, lines, rest, chunk_lines, chunks;
};
constexpr int64_t kMoments = 3, kSums = 2;  // arrays of a chunk

// Lines [offset, offset + lines * width) of the numbers, of which `width` columns exist.
struct NormChunk {
    int64_t offset, lines, width;
};

static inline NormChunk norm_chunk(const NormLines& of, int64_t i) {
    const int64_t line = i * of.chunk_lines, left = of.lines - line;
    if (left <= 0) return {of.lines * of.width, 1, of.rest};
    return {line * of.width, left < of.chunk_lines ? left : of.chunk_lines, of.width};
}

// Groups of rows: how each but the last is cut, and the last.
struct NormGroups {
    NormLines each, last;
    int64_t count;
};

}  // namespace kr

#define KR_KERNEL "cpu/nn/kernels/batch_norm_act_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

static constexpr int64_t kGrain = 4;  // chunks worth a thread
static constexpr int64_t kRun = 8;    // chunks that the second sweep takes in the order of memory, for the prefetcher

template <class T>
static std::unique_ptr<T[]> memory(int64_t count) {
    return std::unique_ptr<T[]>(new T[count]);
}

// The second sweep goes backwards, run by run: what the first read last is still in the cache.
template <class First, class Second>
static void two_sweeps(const NormLines& cut, int64_t arrays, int threads, const First& first, const Second& second) {
    const auto partial = memory<float>(arrays * cut.room * cut.chunks);
    parallel_for(cut.chunks, kGrain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) first(norm_chunk(cut, i), partial.get() + arrays * cut.room * i);
    });
    const auto factors = memory<float>(5 * cut.room);
    const auto sums = memory<double>(2 * cut.room);
    second.merge(partial.get(), sums.get(), factors.get());
    parallel_for(cut.chunks, kGrain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t last = end; last > begin; last -= kRun) {
            const int64_t start = last - kRun > begin ? last - kRun : begin;
            for (int64_t i = start; i < last; ++i) second.sweep(norm_chunk(cut, i), factors.get());
        }
    });
}

template <class Merge, class Sweep>
struct Second {
    Merge merge;
    Sweep sweep;
};
template <class Merge, class Sweep>
Second(Merge, Sweep) -> Second<Merge, Sweep>;

void batch_norm_act(const BatchNormAct& call, int threads) {
    const NormLines cut = KR_DISPATCH(norm_lines, call.rows, call.channels);
    two_sweeps(
        cut, kMoments, threads,
        [&](const NormChunk& chunk, float* partial) { KR_DISPATCH(norm_moments, call, cut, chunk, partial); },
        Second{
            [&](const float* partial, double* sums, float* factors) {
                KR_DISPATCH(norm_merge_moments, call, NormGroups{cut, cut, 1}, partial, sums, factors);
            },
            [&](const NormChunk& chunk, const float* factors) { KR_DISPATCH(norm_apply, call, cut, chunk, factors); }});
}

void batch_norm_act_backward(const BatchNormActGradient& call, int threads) {
    const NormLines cut = KR_DISPATCH(norm_lines, call.rows, call.channels);
    const auto before = memory<float>(3 * cut.room);
    KR_DISPATCH(norm_factors, call, cut, before.get());
    two_sweeps(
        cut, kSums, threads,
        [&](const NormChunk& chunk, float* partial) {
            KR_DISPATCH(norm_sums, call, cut, chunk, before.get(), partial);
        },
        Second{[&](const float* partial, double* sums, float* factors) {
                   KR_DISPATCH(norm_merge_sums, call, NormGroups{cut, cut, 1}, partial, sums, factors);
               },
               [&](const NormChunk& chunk, const float* factors) {
                   KR_DISPATCH(norm_input_gradient, call, cut, chunk, factors);
               }});
}

NormSteps::NormSteps(int64_t rows, int64_t total_rows, int64_t channels) : groups_(new NormGroups), rows_(rows) {
    groups_->count = (total_rows + rows - 1) / rows;
    groups_->each = KR_DISPATCH(norm_lines, rows, channels);
    groups_->last = KR_DISPATCH(norm_lines, total_rows - (groups_->count - 1) * rows, channels);
}
NormSteps::~NormSteps() = default;

int64_t NormSteps::factors() const { return 5 * groups_->each.room; }
int64_t NormSteps::partials() const { return kMoments * groups_->each.room * groups_->each.chunks * groups_->count; }

const NormLines& NormSteps::cut(int64_t rows) const { return rows == rows_ ? groups_->each : groups_->last; }

void NormSteps::moments(const BatchNormAct& call, int64_t group, float* partials) const {
    const NormLines& lines = cut(call.rows);
    float* partial = partials + kMoments * lines.room * groups_->each.chunks * group;
    for (int64_t i = 0; i < lines.chunks; ++i, partial += kMoments * lines.room)
        KR_DISPATCH(norm_moments, call, lines, norm_chunk(lines, i), partial);
}

void NormSteps::merge_moments(const BatchNormAct& all, const float* partials, float* factors) const {
    const auto sums = memory<double>(2 * groups_->each.room);
    KR_DISPATCH(norm_merge_moments, all, *groups_, partials, sums.get(), factors);
}

void NormSteps::given_moments(const BatchNormActGradient& all, float* factors) const {
    KR_DISPATCH(norm_factors, all, groups_->each, factors);
}

void NormSteps::apply(const BatchNormAct& call, const float* factors) const {
    const NormLines& lines = cut(call.rows);
    for (int64_t i = 0; i < lines.chunks; ++i) KR_DISPATCH(norm_apply, call, lines, norm_chunk(lines, i), factors);
}

void NormSteps::sums(const BatchNormActGradient& call, int64_t group, const float* factors, float* partials) const {
    const NormLines& lines = cut(call.rows);
    float* partial = partials + kSums * lines.room * groups_->each.chunks * group;
    for (int64_t i = 0; i < lines.chunks; ++i, partial += kSums * lines.room)
        KR_DISPATCH(norm_sums, call, lines, norm_chunk(lines, i), factors, partial);
}

void NormSteps::merge_sums(const BatchNormActGradient& all, const float* partials, float* factors) const {
    const auto sums = memory<double>(2 * groups_->each.room);
    KR_DISPATCH(norm_merge_sums, all, *groups_, partials, sums.get(), factors);
}

void NormSteps::input_gradient(const BatchNormActGradient& call, const float* factors) const {
    const NormLines& lines = cut(call.rows);
    for (int64_t i = 0; i < lines.chunks; ++i)
        KR_DISPATCH(norm_input_gradient, call, lines, norm_chunk(lines, i), factors);
}

void masked_gradient(const float* grad, const uint8_t* positive, int64_t count, float* out) {
    KR_DISPATCH(norm_masked, grad, positive, count, out);
}

}  // namespace kr
