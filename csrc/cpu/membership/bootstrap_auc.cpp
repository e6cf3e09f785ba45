// Weights on one sort: a replicate is a multinomial weight for each item, so the scores are sorted once.
// Per replicate: one Philox word, one table look-up and one increment a draw (tables stay in L2), then one pass over
// the distinct scores. Integers throughout; the one division is the AUC's.
#include "cpu/membership/bootstrap_auc.h"

#include <vector>

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/membership/bootstrap_auc_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

void bootstrap_auc(const BootstrapAuc& call, int threads) {
    const int64_t groups = call.groups, num_limits = call.num_limits;
    const uint64_t seed = call.seed;
    std::vector<uint32_t> group_of[2];
    for (int side = 0; side < 2; ++side)
        for (int64_t g = 0; g < groups; ++g)
            group_of[side].insert(group_of[side].end(), (size_t)(side ? call.outside : call.inside)[g], (uint32_t)g);
    const int64_t members = (int64_t)group_of[0].size(), others = (int64_t)group_of[1].size();
    parallel_for(call.replicates, 1, threads, [&](int64_t first, int64_t last) {
        std::vector<uint32_t> weight_in((size_t)groups), weight_out((size_t)groups);
        for (int64_t b = first; b < last; ++b) {
            KR_DISPATCH(draw_weights, group_of[0].data(), members, 0u, (uint32_t)b, seed, weight_in.data());
            KR_DISPATCH(draw_weights, group_of[1].data(), others, 1u, (uint32_t)b, seed, weight_out.data());
            int64_t above = 0, false_positives = 0, twice = 0, k = 0;
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t in = weight_in[g], out = weight_out[g];
                weight_in[g] = weight_out[g] = 0;
                false_positives += out;
                while (k < num_limits && false_positives > call.limits[k]) call.tp[b * num_limits + k++] = above;
                twice += out * (2 * above + in);
                above += in;
            }
            while (k < num_limits) call.tp[b * num_limits + k++] = above;
            call.auc[b] = (double)twice / (2.0 * (double)members * (double)others);
        }
    });
}

}  // namespace kr
