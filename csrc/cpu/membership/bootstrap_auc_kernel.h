// Included once per instruction set by bootstrap_auc.cpp.

#include "common/sampling/philox.h"

// Adds 1 to the weight of the group of each of n items drawn with replacement from n.
static void draw_weights(const uint32_t* group_of, int64_t n, uint32_t side, uint32_t replicate, uint64_t seed,
                         uint32_t* weights) {
    uint32_t lane_index[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lane_index[lane] = (uint32_t)lane;
    u32v lanes;
    std::memcpy(&lanes, lane_index, sizeof lanes);
    for (int64_t start = 0; start < n; start += 4 * kLanes) {
        const Words words = philox(splat_u((uint32_t)(start / 4)) + lanes, splat_u(side), splat_u(replicate),
                                   splat_u(0), (uint32_t)seed, (uint32_t)(seed >> 32));
        uint32_t drawn[4][kLanes];
        std::memcpy(drawn, &words, sizeof drawn);
        const bool whole = start + 4 * kLanes <= n;
        for (int i = 0; i < 4; ++i)
            for (int lane = 0; lane < kLanes; ++lane)
                if (whole || start + 4 * lane + i < n)
                    ++weights[group_of[(uint64_t)drawn[i][lane] * (uint64_t)n >> 32]];
    }
}
