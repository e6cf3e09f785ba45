#include "cpu/roc.h"

#include <cstring>
#include <utility>
#include <vector>

namespace kr {
namespace {

struct Item {
    uint64_t key;
    uint64_t member;
};

// An unsigned key whose order is that of descending doubles; -0 and +0 get the same key. No NaN reaches this.
uint64_t descending_key(double value) {
    uint64_t bits;
    value += 0.0;
    std::memcpy(&bits, &value, sizeof bits);
    return bits >> 63 ? bits : ~(bits | (uint64_t{1} << 63));
}

double value_of(uint64_t key) {
    const uint64_t bits = key >> 63 ? key : ~key & ~(uint64_t{1} << 63);
    double out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// Least significant digit first, 11 bits a pass; passes in which all keys share the digit are skipped.
void radix_sort(std::vector<Item>& items) {
    constexpr int kBits = 11, kDigits = 1 << kBits;
    std::vector<Item> other(items.size());
    std::vector<size_t> count(kDigits);
    for (int shift = 0; shift < 64; shift += kBits) {
        std::fill(count.begin(), count.end(), size_t{0});
        for (const Item& item : items) ++count[item.key >> shift & (kDigits - 1)];
        if (!items.empty() && count[items[0].key >> shift & (kDigits - 1)] == items.size()) continue;
        size_t start = 0;
        for (size_t& each : count) start += std::exchange(each, start);
        for (const Item& item : items) other[count[item.key >> shift & (kDigits - 1)]++] = item;
        items.swap(other);
    }
}

}  // namespace

int64_t roc(const double* scores, const uint8_t* members, int64_t n, double* thresholds, int64_t* tp, int64_t* fp) {
    std::vector<Item> items(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) items[i] = {descending_key(scores[i]), members[i] ? uint64_t{1} : uint64_t{0}};
    radix_sort(items);
    int64_t points = 0, above_in = 0, above_out = 0;
    for (int64_t i = 0; i < n; ++i) {
        above_in += (int64_t)items[i].member;
        above_out += 1 - (int64_t)items[i].member;
        if (i + 1 == n || items[i + 1].key != items[i].key) {
            thresholds[points] = value_of(items[i].key);
            tp[points] = above_in;
            fp[points++] = above_out;
        }
    }
    return points;
}

}  // namespace kr
