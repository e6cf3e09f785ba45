// Included once per instruction set by rmia.cpp.

constexpr int kParts = (int)(kBlockBits / 32) / kLanes;  // vectors of a bit set: 1 with AVX-512, 2 with AVX2

// Adds to count[n] how many of a block's 512 z have a strict majority of the queries' bits, for n in [first, last).
// The bits are added by full adders into planes (plane p is worth 2^p). The planes start at 2^k - 1 - queries / 2, so
// that a count above queries / 2 is one that reaches plane k: no comparison at the end.
static void count_votes(const uint32_t* below, int64_t first, int64_t last, int64_t queries,
                        const uint16_t* const* block_rank, const uint64_t* const* bits, int64_t* count) {
    int top = 1;
    while ((int64_t{1} << top) < queries + 1) ++top;
    const int64_t start = (int64_t{1} << top) - 1 - queries / 2;  // + votes >= 2^top iff votes >= queries / 2 + 1
    for (int64_t n = first; n < last; ++n) {
        i32v plane[16][kParts];
        for (int p = 0; p <= top; ++p)
            for (int v = 0; v < kParts; ++v) plane[p][v] = splat_i((start >> p & 1) ? -1 : 0);
        auto row = [&](int64_t a) { return bits[a] + (int64_t)block_rank[a][below[n * queries + a]] * kWords; };
        int64_t a = 0;
        for (; a + 2 <= queries; a += 2) {
            // Two votes and plane 0: their sum is in plane 0, their carry goes on.
            const uint64_t *one = row(a), *two = row(a + 1);
            i32v carry[kParts];
            for (int v = 0; v < kParts; ++v) {
                i32v x, y;
                std::memcpy(&x, (const char*)one + v * sizeof x, sizeof x);
                std::memcpy(&y, (const char*)two + v * sizeof y, sizeof y);
                const i32v half = x ^ y, z = plane[0][v];
                plane[0][v] = half ^ z;
                carry[v] = (x & y) | (half & z);
            }
            for (int p = 1; p <= top; ++p)
                for (int v = 0; v < kParts; ++v) {
                    const i32v both = plane[p][v] & carry[v];
                    plane[p][v] ^= carry[v];
                    carry[v] = both;
                }
        }
        for (; a < queries; ++a) {
            const uint64_t* one = row(a);
            for (int v = 0; v < kParts; ++v) {
                i32v carry;
                std::memcpy(&carry, (const char*)one + v * sizeof carry, sizeof carry);
                for (int p = 0; p <= top; ++p) {
                    const i32v both = plane[p][v] & carry;
                    plane[p][v] ^= carry;
                    carry = both;
                }
            }
        }
        // Unused bits of the last block have no votes and cannot reach the top plane.
        uint64_t majority[kWords];
        std::memcpy(majority, plane[top], sizeof majority);
        int64_t sum = 0;
        for (int w = 0; w < kWords; ++w) sum += __builtin_popcountll(majority[w]);
        count[n] += sum;
    }
}
