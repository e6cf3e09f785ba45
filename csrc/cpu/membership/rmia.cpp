// RMIA (Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024) by rank.
//
// One query: each predicate holds for a prefix of the sorted z, so the count is a rank: O((N + Z) log Z) instead of N Z
// divisions. The search compares with x / gamma, and the exact predicate corrects its last place.
//
// Vote of two: both must agree, so the count is one of points below and to the left: x in the order of the first query,
// each z inserted before the first x above it, and a table of how many inserted z have a rank below each in the second.
//
// Vote of A queries: for each query, whether z is below x is rank(z) < count(x). A block of 512 z has only 513 such
// patterns for a query, prefixes of its order, so a table of bit sets replaces the comparisons; the votes of 512 z are
// added as bit planes. N Z A / 512 steps, O((N + Z) A) memory.
#include "cpu/membership/rmia.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/simd/parallel.h"
#include "cpu/simd/radix_sort.h"

namespace kr {
constexpr int64_t kBlockBits = 512, kWords = kBlockBits / 64;
}

#define KR_KERNEL "cpu/membership/rmia_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {
namespace {

// The distinct values of z in ascending order, and before[i] = how many z are smaller than the i-th.
template <class T>
struct Ranks {
    std::vector<T> value;
    std::vector<int64_t> before;
    std::vector<uint32_t> of;  // distinct index of each z

    Ranks(const T* z, int64_t count) : of((size_t)count) {
        std::vector<KeyedItem> order((size_t)count);
        for (int64_t i = 0; i < count; ++i) order[i] = {~descending_key((double)z[i]), (uint64_t)i};
        radix_sort(order);
        for (int64_t i = 0; i < count; ++i) {
            const uint64_t at = order[i].payload;
            if (i == 0 || order[i].key != order[i - 1].key) value.push_back(z[at]), before.push_back(i);
            of[at] = (uint32_t)value.size() - 1;
        }
        before.push_back(count);
    }

    // Number of distinct z that the predicate holds for: a prefix of their order.
    int64_t distinct_below(T x, T gamma, Predicate predicate) const {
        const T limit = x / gamma;
        int64_t at = 0, size = (int64_t)value.size();
        for (int64_t left = size; left > 0;) {  // last place with value <= limit, without branches on the data
            const int64_t half = (left + 1) / 2;
            at += value[at + half - 1] <= limit ? half : 0;
            left = left - half;
        }
        while (at > 0 && !dominates(x, value[at - 1], gamma, predicate)) --at;
        while (at < size && dominates(x, value[at], gamma, predicate)) ++at;
        return at;
    }
};

// For one query and one block: row c is the bit set of the c lowest-ranked z of the block.
struct VoteTable {
    std::vector<uint64_t> bits;

    void build(const std::vector<std::pair<uint32_t, uint32_t>>& order) {
        bits.assign((order.size() + 1) * kWords, 0);
        for (size_t c = 0; c < order.size(); ++c) {
            uint64_t* row = bits.data() + (c + 1) * kWords;
            std::copy(row - kWords, row, row);
            row[order[c].second / 64] |= uint64_t{1} << (order[c].second % 64);
        }
    }
};

template <class T>
void rmia_count(const T* x, const T* z, int64_t num_x, int64_t num_z, T gamma, Predicate predicate, int64_t* count,
                int threads) {
    const Ranks<T> ranks(z, num_z);
    parallel_for(num_x, 1024, threads, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) count[n] = ranks.before[ranks.distinct_below(x[n], gamma, predicate)];
    });
}

// How many of the inserted ranks are below r, in two loads: before its block, and before it in its block. An insertion
// passes over half a block and over the blocks above: O(sqrt(size)), in loops without branches.
class Below {
  public:
    explicit Below(int64_t size) {
        while ((int64_t{1} << 2 * shift_) < size + 1) ++shift_;
        const int64_t blocks = (size >> shift_) + 1;
        blocks_.assign((size_t)blocks, 0), within_.assign((size_t)(blocks << shift_), 0);
    }
    int64_t operator()(uint32_t r) const { return (int64_t)blocks_[r >> shift_] + within_[r]; }
    void insert(uint32_t r) {
        const size_t block = r >> shift_;
        for (size_t i = r + size_t{1}, end = (block + 1) << shift_; i < end; ++i) ++within_[i];
        for (size_t b = block + 1; b < blocks_.size(); ++b) ++blocks_[b];
    }

  private:
    int shift_ = 4;
    std::vector<uint32_t> blocks_, within_;
};

// order[start[v] .. start[v + 1]): the i whose key(i) is v, in [0, values].
template <class Key>
void bucket(int64_t count, int64_t values, const Key& key, std::vector<int64_t>& start, std::vector<int64_t>& order) {
    start.assign((size_t)values + 2, 0), order.resize((size_t)count);
    for (int64_t i = 0; i < count; ++i) ++start[key(i) + size_t{1}];
    for (int64_t v = 0; v <= values; ++v) start[v + 1] += start[v];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < count; ++i) order[next[key(i)]++] = i;
}

template <class T>
void rmia_pair(const T* x, const T* z, int64_t num_x, int64_t num_z, T gamma, Predicate predicate, int64_t* count,
               int threads) {
    const Ranks<T> first(z, num_z), second(z + num_z, num_z);
    std::vector<uint32_t> below((size_t)(2 * num_x));
    std::vector<int64_t> x_at, x_order, z_at, z_order;
    parallel_for(num_x, 1024, threads, [&](int64_t from, int64_t to) {
        for (int64_t n = from; n < to; ++n) {
            below[2 * n] = (uint32_t)first.distinct_below(x[n], gamma, predicate);
            below[2 * n + 1] = (uint32_t)second.distinct_below(x[num_x + n], gamma, predicate);
        }
    });
    const int64_t values = (int64_t)first.value.size();
    bucket(num_x, values, [&](int64_t n) { return below[2 * n]; }, x_at, x_order);
    bucket(num_z, values, [&](int64_t i) { return first.of[i]; }, z_at, z_order);
    Below seen((int64_t)second.value.size());
    for (int64_t v = 0; v <= values; ++v) {  // z of ranks below v are in
        for (int64_t i = x_at[v]; i < x_at[v + 1]; ++i) count[x_order[i]] = seen(below[2 * x_order[i] + 1]);
        for (int64_t i = z_at[v]; i < z_at[v + 1]; ++i) seen.insert(second.of[z_order[i]]);
    }
}

template <class T>
void rmia_vote(const T* x, const T* z, int64_t queries, int64_t num_x, int64_t num_z, T gamma, Predicate predicate,
               int64_t* count, int threads) {
    // below[n, a]: distinct z of query a below x; rank[a, z]: distinct index. z counts iff rank < below.
    std::vector<uint32_t> below((size_t)(num_x * queries)), rank((size_t)(queries * num_z));
    std::vector<int64_t> distinct((size_t)queries);
    for (int64_t a = 0; a < queries; ++a) {
        const Ranks<T> ranks(z + a * num_z, num_z);
        distinct[a] = (int64_t)ranks.value.size();
        std::copy(ranks.of.begin(), ranks.of.end(), rank.begin() + a * num_z);
        parallel_for(num_x, 1024, threads, [&](int64_t first, int64_t last) {
            for (int64_t n = first; n < last; ++n)
                below[n * queries + a] = (uint32_t)ranks.distinct_below(x[a * num_x + n], gamma, predicate);
        });
    }
    std::fill(count, count + num_x, int64_t{0});
    const int64_t blocks = (num_z + kBlockBits - 1) / kBlockBits;
    // Each thread takes a share of the x's and builds every block's tables for itself: their cost is Z A a thread.
    parallel_for(num_x, 256, threads, [&](int64_t first, int64_t last) {
        std::vector<VoteTable> tables((size_t)queries);
        std::vector<std::vector<uint16_t>> block_rank((size_t)queries);
        std::vector<std::pair<uint32_t, uint32_t>> order;
        for (int64_t a = 0; a < queries; ++a) block_rank[a].resize((size_t)distinct[a] + 1);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t start = block * kBlockBits, width = std::min<int64_t>(kBlockBits, num_z - start);
            for (int64_t a = 0; a < queries; ++a) {
                order.clear();
                for (int64_t i = 0; i < width; ++i) order.emplace_back(rank[a * num_z + start + i], (uint32_t)i);
                std::sort(order.begin(), order.end());
                tables[a].build(order);
                // block_rank[c]: how many of the block's ranks are below c.
                for (int64_t c = 0, i = 0; c <= distinct[a]; ++c) {
                    while (i < width && (int64_t)order[i].first < c) ++i;
                    block_rank[a][c] = (uint16_t)i;
                }
            }
            std::vector<const uint16_t*> block_ranks;
            std::vector<const uint64_t*> bits;
            for (int64_t a = 0; a < queries; ++a)
                block_ranks.push_back(block_rank[a].data()), bits.push_back(tables[a].bits.data());
            KR_DISPATCH(count_votes, below.data(), first, last, queries, block_ranks.data(), bits.data(), count);
        }
    });
}

template <class T>
void rmia_of(const Rmia& call, int64_t* count, int threads) {
    const auto *x = static_cast<const T*>(call.x), *z = static_cast<const T*>(call.z);
    const T gamma = (T)call.gamma;
    if (call.queries == 1)
        rmia_count(x, z, call.num_x, call.num_z, gamma, call.predicate, count, threads);
    else if (call.queries == 2)
        rmia_pair(x, z, call.num_x, call.num_z, gamma, call.predicate, count, threads);
    else
        rmia_vote(x, z, call.queries, call.num_x, call.num_z, gamma, call.predicate, count, threads);
}

}  // namespace

void rmia(const Rmia& call, int64_t* count, int threads) {
    call.float64 ? rmia_of<double>(call, count, threads) : rmia_of<float>(call, count, threads);
}

}  // namespace kr
