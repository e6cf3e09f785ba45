#include "cpu/privacy/embedding_grad_norms.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/simd/parallel.h"

#define KR_KERNEL "cpu/privacy/embedding_grad_norms_kernel.h"
#include "cpu/simd/foreach_isa.h"

namespace kr {

static constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

void embedding_grad_norms(const EmbeddingGradNorms& call, int threads) {
    parallel_for(call.records, kGrain / (call.rows * call.size + 1) + 1, threads, [&](int64_t begin, int64_t end) {
        std::vector<int64_t> positions(call.rows);
        for (int64_t record = begin; record < end; ++record) {
            // Positions of one index side by side, in their order, so that sums do not depend on the sort.
            std::iota(positions.begin(), positions.end(), record * call.rows);
            std::sort(positions.begin(), positions.end(), [&](int64_t a, int64_t b) {
                return call.indices[a] != call.indices[b] ? call.indices[a] < call.indices[b] : a < b;
            });
            double square = 0.0;
            for (int64_t i = 0, next; i < call.rows; i = next) {
                const int64_t index = call.indices[positions[i]];
                for (next = i + 1; next < call.rows && call.indices[positions[next]] == index;) ++next;
                if (index != call.padding) square += KR_DISPATCH(embedding_row, call, positions.data() + i, next - i);
            }
            call.norms[record] = (float)std::sqrt(square);
        }
    });
}

}  // namespace kr
