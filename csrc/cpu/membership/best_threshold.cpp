// Thresholds of all targets from one sort: each target passes over the sorted values and skips its own.
//
// TPR - FPR is (tp N - fp P) / (P N) with P members and N others, an integer that is moved by N or by P at each value.
// It says which points can be the best; only those are divided, so that rates that round to the same number stay a tie.
#include "cpu/membership/roc.h"

#include <algorithm>
#include <limits>

#include "cpu/simd/parallel.h"
#include "cpu/simd/radix_sort.h"

namespace kr {
namespace {

constexpr uint64_t kMember = 1, kLast = 2, kModel = 4;  // payload: member's, last of its equals, model times 4

double best_without(const std::vector<KeyedItem>& items, uint64_t skipped, int64_t members, int64_t others) {
    if (members == 0 || others == 0) return std::numeric_limits<double>::quiet_NaN();
    // Points this close may change places when their rates are rounded.
    const int64_t near = (int64_t)((double)members * (double)others * 1e-15);
    int64_t tp = 0, fp = 0, most = std::numeric_limits<int64_t>::min();
    double best = -2;
    uint64_t key = 0;
    for (const KeyedItem& item : items) {
        const int64_t counts = item.payload / kModel != skipped, member = item.payload & kMember;
        tp += counts & member, fp += counts & (1 - member);
        const int64_t gain = tp * others - fp * members;
        if (!(item.payload & kLast) || gain < most || tp + fp == 0) continue;
        const double difference = (double)tp / (double)members - (double)fp / (double)others;
        most = std::max(most, gain - near);
        if (difference > best) best = difference, key = item.key;
    }
    return value_of_descending_key(key);
}

}  // namespace

void best_threshold(const BestThreshold& call, int threads) {
    const int64_t examples = call.examples, models = call.models, count = examples * models;
    std::vector<KeyedItem> items((size_t)count);
    std::vector<int64_t> own((size_t)models);  // members of each model
    int64_t members = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t member = call.members[i] ? kMember : 0;
        items[i] = {descending_key(call.values[i]), (uint64_t)(i % models) * kModel + member};
        own[i % models] += (int64_t)member, members += (int64_t)member;
    }
    radix_sort(items);
    for (int64_t i = 0; i < count; ++i)
        if (i + 1 == count || items[i + 1].key != items[i].key) items[i].payload |= kLast;
    parallel_for(call.leave_out ? models : 1, 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k)
            call.thresholds[k] = call.leave_out ? best_without(items, (uint64_t)k, members - own[k],
                                                               count - examples - (members - own[k]))
                                                : best_without(items, (uint64_t)models, members, count - members);
    });
}

}  // namespace kr
