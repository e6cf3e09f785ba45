// Included once per instruction set by resize_image.cpp.
//
// Both axes are weighted sums of rows: the vertical pass, which reads every pixel, goes first and writes its rows
// turned by 90 degrees. Between the passes a pixel has 6 bits behind the point, so that it is rounded twice and wrong
// by at most 0.52 levels. Two rows at a time are multiplied by pmaddwd.

constexpr int kBetween = 8, kLast = 20;  // 14 + 14 bits of weights, 6 of which stay between the passes

#if KR_LANES > 1
KR_FN __m256i sixteen(const uint8_t* from) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from)); }
KR_FN __m256i sixteen(const int16_t* from) { return _mm256_loadu_si256((const __m256i*)from); }

// Adds the next 2 * Pairs rows to the sums of `count` columns, a multiple of 16: so many rows at a time that sums are
// seldom loaded, and so few that the processor follows them all. `taps` are left; beyond them is the last with weight
// 0. Unpacking and packing both go by halves of a register, so that packing restores the order.
template <int Pairs, class T>
KR_FN void add_rows(const T* rows, int64_t stride, const int16_t* weights, int64_t taps, int64_t count, int32_t* sums) {
    const T* row[2 * Pairs];
    __m256i both[Pairs];
    KR_UNROLL for (int p = 0; p < Pairs; ++p) {
        const bool pair = 2 * p + 1 < taps;
        row[2 * p] = rows + 2 * p * stride;
        row[2 * p + 1] = pair ? row[2 * p] + stride : row[2 * p];
        both[p] = _mm256_set1_epi32((pair ? weights[2 * p + 1] << 16 : 0) | weights[2 * p]);
    }
    for (int64_t j = 0; j < count; j += 16) {
        __m256i low = _mm256_load_si256((const __m256i*)(sums + j));
        __m256i high = _mm256_load_si256((const __m256i*)(sums + j + 8));
        KR_UNROLL for (int p = 0; p < Pairs; ++p) {
            const __m256i x = sixteen(row[2 * p] + j), y = sixteen(row[2 * p + 1] + j);
            low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), both[p]));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), both[p]));
        }
        _mm256_store_si256((__m256i*)(sums + j), low);
        _mm256_store_si256((__m256i*)(sums + j + 8), high);
    }
}
#endif

// out[j] = round(sum over k of weights[k] rows[k stride + j] / 2^shift) for j < count.
template <class T>
KR_FN void sum_rows(const T* rows, int64_t stride, const int16_t* weights, int64_t taps, int shift, int64_t count,
                    int16_t* out) {
    int64_t done = 0;
#if KR_LANES > 1
    constexpr int64_t kColumns = 1024;  // whose sums stay in the cache, while rows are read in their order
    alignas(32) int32_t sums[kColumns];
    const __m256i half = _mm256_set1_epi32(1 << (shift - 1));
    const __m128i by = _mm_cvtsi32_si128(shift);
    for (int64_t part; (part = (count - done) & ~(int64_t)15) > 0; done += part) {
        if (part > kColumns) part = kColumns;
        for (int64_t j = 0; j < part; j += 8) _mm256_store_si256((__m256i*)(sums + j), half);
        int64_t k = 0;
        for (; taps - k >= 8; k += 8) add_rows<4>(rows + k * stride + done, stride, weights + k, taps - k, part, sums);
        for (; k < taps; k += 2) add_rows<1>(rows + k * stride + done, stride, weights + k, taps - k, part, sums);
        for (int64_t j = 0; j < part; j += 16) {
            const __m256i low = _mm256_sra_epi32(_mm256_load_si256((const __m256i*)(sums + j)), by);
            const __m256i high = _mm256_sra_epi32(_mm256_load_si256((const __m256i*)(sums + j + 8)), by);
            _mm256_storeu_si256((__m256i*)(out + done + j), _mm256_packs_epi32(low, high));
        }
    }
#endif
    for (; done < count; ++done) {
        int32_t sum = 1 << (shift - 1);
        for (int64_t k = 0; k < taps; ++k) sum += weights[k] * (int32_t)rows[k * stride + done];
        out[done] = (int16_t)(sum >> shift);
    }
}

// Pixel x of line i becomes pixel i of row x, `step` values apart, of `to`.
KR_FN void turn(const int16_t* lines, int64_t width, int64_t channels, int64_t count, int64_t step, int16_t* to) {
    for (int64_t x = 0; x < width; ++x)
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(to + x * step + i * channels, lines + (i * width + x) * channels, 2 * channels);
}

// The first `kept` channels of each pixel of a row as a column of the result.
KR_FN void put(const int16_t* row, int64_t channels, int64_t count, int64_t kept, int64_t stride, uint8_t* out) {
    for (int64_t i = 0; i < count; i += channels, out += stride)
        for (int64_t c = 0; c < kept; ++c) out[c] = (uint8_t)row[i + c];
}

// scratch: kLines lines, a row of the result turned, the image between the passes turned.
static void resample(const ResizeImage& call, int16_t* scratch) {
    const ResizeAxis rows = call.rows, columns = call.columns;
    const int64_t channels = call.channels, kept = call.out_channels, stride = call.out_stride;
    uint8_t* out = call.out;
    const int64_t before = columns.from * channels, after = rows.to * channels;
    int16_t *lines = scratch, *row = lines + kLines * before, *turned = row + after;
    for (int64_t y = 0; y < rows.to; y += kLines) {
        const int64_t count = rows.to - y < kLines ? rows.to - y : kLines;
        for (int64_t i = y; i < y + count; ++i)
            sum_rows(call.pixels + rows.first[i] * call.stride, call.stride, rows.weights + i * rows.taps, rows.taps,
                     kBetween, before, lines + (i - y) * before);
        if (channels == 4 && count == kLines)  // a constant makes one instruction of the copy of a pixel
            turn(lines, columns.from, 4, kLines, after, turned + y * 4);
        else
            turn(lines, columns.from, channels, count, after, turned + y * channels);
    }
    for (int64_t x = 0; x < columns.to; ++x) {
        sum_rows(turned + columns.first[x] * after, after, columns.weights + x * columns.taps, columns.taps, kLast,
                 after, row);
        if (kept == 3)
            put(row, channels, after, 3, stride, out + x * 3);
        else
            put(row, channels, after, kept, stride, out + x * kept);
    }
}
