// A stable radix sort of 64-bit keys with a payload, and keys in the order of floating-point numbers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace kr {

struct KeyedItem {
    uint64_t key;
    uint64_t payload;
};

// An unsigned key whose order is that of descending doubles; -0 and +0 get the same key. No NaN reaches this.
inline uint64_t descending_key(double value) {
    uint64_t bits;
    value += 0.0;
    std::memcpy(&bits, &value, sizeof bits);
    return bits >> 63 ? bits : ~(bits | (uint64_t{1} << 63));
}

inline double value_of_descending_key(uint64_t key) {
    const uint64_t bits = key >> 63 ? key : ~key & ~(uint64_t{1} << 63);
    double out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// Ascending keys, least significant digit first, 11 bits a pass; passes in which all keys share the digit are skipped.
inline void radix_sort(std::vector<KeyedItem>& items) {
    constexpr int kBits = 11, kDigits = 1 << kBits;
    std::vector<KeyedItem> other(items.size());
    std::vector<size_t> count(kDigits);
    for (int shift = 0; shift < 64; shift += kBits) {
        count.assign(kDigits, 0);
        for (const KeyedItem& item : items) ++count[item.key >> shift & (kDigits - 1)];
        if (!items.empty() && count[items[0].key >> shift & (kDigits - 1)] == items.size()) continue;
        size_t start = 0;
        for (size_t& each : count) start += std::exchange(each, start);
        for (const KeyedItem& item : items) other[count[item.key >> shift & (kDigits - 1)]++] = item;
        items.swap(other);
    }
}

}  // namespace kr
