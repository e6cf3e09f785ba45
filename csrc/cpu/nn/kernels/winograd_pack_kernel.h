// Included once per instruction set by winograd_pack.cpp.
//
// The weight of winograd_conv2d: U = G g G^T of every filter g, in double. One block of outputs and a group of inputs
// at a time: filters are copied so that outputs lie side by side, and every place of U is then written a whole line at
// a time.
constexpr int kTaps = 9, kInputs = 16;

template <int kBlock>
static void winograd_pack_block(const WinogradPack& call, int64_t block) {
    const int64_t blocks = (call.outputs + kBlock - 1) / kBlock,
                  padded = (call.inputs + kInputs - 1) / kInputs * kInputs;
    const int64_t first = block * kBlock, left = call.outputs - first, live = left < kBlock ? left : kBlock;
    alignas(64) double filters[kInputs][kTaps][kBlock], rows[3][kBlock];
    for (int64_t start = 0; start < padded; start += kInputs) {
        const int64_t count = call.inputs - start < kInputs ? call.inputs - start : kInputs;
        std::memset(filters, 0, sizeof filters);
        for (int64_t o = 0; o < live; ++o) {
            const float* from = call.weight + (first + o) * call.output_step + start * call.input_step;
            const double scale = call.scale ? call.scale[first + o] : 1.0;
            for (int64_t i = 0; i < count; ++i)
                for (int t = 0; t < kTaps; ++t)
                    filters[i][t][o] = scale * static_cast<double>(from[i * call.input_step + t * call.tap_step]);
        }
        for (int64_t i = 0; i < kInputs; ++i)
            for (int down = 0; down < 6; ++down) {
                const double *g = call.transform + 3 * down, (*taps)[kBlock] = filters[i];
                for (int t = 0; t < 3; ++t)
                    for (int o = 0; o < kBlock; ++o)
                        rows[t][o] = g[0] * taps[t][o] + g[1] * taps[3 + t][o] + g[2] * taps[6 + t][o];
                for (int across = 0; across < 6; ++across) {
                    const double* h = call.transform + 3 * across;
                    float* to = call.packed + (((6 * down + across) * blocks + block) * padded + start + i) * kBlock;
                    for (int o = 0; o < kBlock; ++o)
                        to[o] = static_cast<float>(h[0] * rows[0][o] + h[1] * rows[1][o] + h[2] * rows[2][o]);
                }
            }
    }
}
