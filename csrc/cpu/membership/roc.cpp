#include "cpu/membership/roc.h"

#include "cpu/simd/radix_sort.h"

namespace kr {

int64_t roc(const Roc& call) {
    const int64_t n = call.n;
    std::vector<KeyedItem> items(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i)
        items[i] = {descending_key(call.scores[i]), call.members[i] ? uint64_t{1} : uint64_t{0}};
    radix_sort(items);
    int64_t points = 0, above_in = 0, above_out = 0;
    for (int64_t i = 0; i < n; ++i) {
        above_in += (int64_t)items[i].payload;
        above_out += 1 - (int64_t)items[i].payload;
        if (i + 1 == n || items[i + 1].key != items[i].key) {
            call.thresholds[points] = value_of_descending_key(items[i].key);
            call.tp[points] = above_in;
            call.fp[points++] = above_out;
        }
    }
    return points;
}

}  // namespace kr
