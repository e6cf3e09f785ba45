#include "cpu/membership/roc.h"

#include "cpu/simd/radix_sort.h"

namespace kr {

int64_t roc(const double* scores, const uint8_t* members, int64_t n, double* thresholds, int64_t* tp, int64_t* fp) {
    std::vector<KeyedItem> items(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) items[i] = {descending_key(scores[i]), members[i] ? uint64_t{1} : uint64_t{0}};
    radix_sort(items);
    int64_t points = 0, above_in = 0, above_out = 0;
    for (int64_t i = 0; i < n; ++i) {
        above_in += (int64_t)items[i].payload;
        above_out += 1 - (int64_t)items[i].payload;
        if (i + 1 == n || items[i + 1].key != items[i].key) {
            thresholds[points] = value_of_descending_key(items[i].key);
            tp[points] = above_in;
            fp[points++] = above_out;
        }
    }
    return points;
}

}  // namespace kr
