// Rows of any element type as float32, for the instruction set that foreach_isa.h is compiling. No include guard.
#include "cpu/simd/lanes_io.h"

template <class T>
static void to_floats(const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load_as(from + i));
    for (; i < n; ++i) to[i] = to_float(from[i]);
}

template <class T>
static void from_floats(const float* from, int64_t n, T* to) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_as(to + i, load(from + i));
    for (; i < n; ++i) from_float(to + i, from[i]);
}

// Where n floats of the row can be read: in place, or converted into scratch.
KR_FN const float* to_float_row(const void* base, Dtype dtype, int64_t offset, int64_t n, float* scratch) {
    if (dtype == Dtype::f32) return static_cast<const float*>(base) + offset;
    if (dtype == Dtype::bf16)
        to_floats(static_cast<const Bf16*>(base) + offset, n, scratch);
    else
        to_floats(static_cast<const F16*>(base) + offset, n, scratch);
    return scratch;
}

KR_FN void from_float_row(const float* from, Dtype dtype, void* base, int64_t offset, int64_t n) {
    if (dtype == Dtype::bf16)
        from_floats(from, n, static_cast<Bf16*>(base) + offset);
    else
        from_floats(from, n, static_cast<F16*>(base) + offset);
}

KR_FN float element(const void* base, Dtype dtype, int64_t at) {
    if (dtype == Dtype::f32) return static_cast<const float*>(base)[at];
    return dtype == Dtype::bf16 ? to_float(static_cast<const Bf16*>(base)[at])
                                : to_float(static_cast<const F16*>(base)[at]);
}

#if KR_LANES > 1
KR_FN void transpose_8x8(__m256 a[8]) {
    __m256 b[8];
    for (int r = 0; r < 8; r += 2) {
        b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4)
        for (int k = 0; k < 2; ++k) {
            a[r + 2 * k] = _mm256_shuffle_ps(b[r + k], b[r + 2 + k], 0x44);
            a[r + 2 * k + 1] = _mm256_shuffle_ps(b[r + k], b[r + 2 + k], 0xEE);
        }
    for (int k = 0; k < 4; ++k) {
        b[k] = _mm256_permute2f128_ps(a[k], a[k + 4], 0x20);
        b[k + 4] = _mm256_permute2f128_ps(a[k], a[k + 4], 0x31);
    }
    for (int k = 0; k < 8; ++k) a[k] = b[k];
}

// Where the groups of 8 columns start: the last one overlaps its neighbour instead of being cut, from 8 classes on.
KR_FN int group_start(int j, int classes) { return classes >= 8 && j + 8 > classes ? classes - 8 : j; }

KR_FN void read_8_rows(const float* const* rows, int j, int classes, __m256 a[8]) {
    const __m256i mask = first_of_8(classes);
    if (classes >= 8)
        for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_ps(rows[r] + j);
    else
        for (int r = 0; r < 8; ++r) a[r] = _mm256_maskload_ps(rows[r], mask);
    transpose_8x8(a);
}

KR_FN void write_8_rows(float* const* rows, int j, int classes, __m256 a[8], int count) {
    const __m256i mask = first_of_8(classes);
    transpose_8x8(a);
    if (classes >= 8 && count >= 8) {
        for (int r = 0; r < 8; ++r) _mm256_storeu_ps(rows[r] + j, a[r]);
        return;
    }
    for (int r = 0; r < 8 && r < count; ++r) {
        if (classes >= 8)
            _mm256_storeu_ps(rows[r] + j, a[r]);
        else
            _mm256_maskstore_ps(rows[r], mask, a[r]);
    }
}

// out[j * kLanes + r] = rows[r][j] for kLanes rows.
KR_FN void transpose_in(const float* const* rows, int classes, float* out) {
    for (int from = 0; from < classes; from += 8) {
        const int j = group_start(from, classes);
        __m256 a[8];
        read_8_rows(rows, j, classes, a);
#if KR_LANES == 16
        __m256 b[8];
        read_8_rows(rows + 8, j, classes, b);
        for (int k = 0; k < 8; ++k)
            _mm512_storeu_ps(out + (j + k) * kLanes, _mm512_insertf32x8(_mm512_castps256_ps512(a[k]), b[k], 1));
#else
        for (int k = 0; k < 8; ++k) _mm256_storeu_ps(out + (j + k) * kLanes, a[k]);
#endif
    }
}

// rows[r][j] = in[j * kLanes + r] for the first `count` of kLanes rows.
KR_FN void transpose_out(const float* in, int classes, float* const* rows, int count) {
    for (int from = 0; from < classes; from += 8) {
        const int j = group_start(from, classes);
        __m256 a[8];
#if KR_LANES == 16
        __m256 b[8];
        for (int k = 0; k < 8; ++k) {
            const __m512 both = _mm512_loadu_ps(in + (j + k) * kLanes);
            a[k] = _mm512_castps512_ps256(both), b[k] = _mm512_extractf32x8_ps(both, 1);
        }
        write_8_rows(rows + 8, j, classes, b, count - 8);
#else
        for (int k = 0; k < 8; ++k) a[k] = _mm256_loadu_ps(in + (j + k) * kLanes);
#endif
        write_8_rows(rows, j, classes, a, count);
    }
}
#endif

// out[j * kLanes + r] = rows[r][j]; out has room for kLanes rows of at least 8 classes.
KR_FN void load_lanes(const float* const* rows, int classes, float* out) {
#if KR_LANES == 1
    for (int j = 0; j < classes; ++j) out[j] = rows[0][j];
#else
    transpose_in(rows, classes, out);
#endif
}

// The way back, to `count` contiguous rows of any element type; scratch holds kLanes rows.
static inline void store_lanes(const float* in, void* base, Dtype dtype, int64_t row, int count, int classes,
                               float* scratch) {
    float* rows[kLanes];
    for (int r = 0; r < kLanes; ++r)
        rows[r] = dtype == Dtype::f32 ? static_cast<float*>(base) + (row + r) * classes : scratch + r * classes;
#if KR_LANES == 1
    for (int j = 0; j < classes; ++j) rows[0][j] = in[j];
#else
    transpose_out(in, classes, rows, count);
#endif
    if (dtype != Dtype::f32)
        for (int r = 0; r < count; ++r) from_float_row(rows[r], dtype, base, (row + r) * classes, classes);
}
