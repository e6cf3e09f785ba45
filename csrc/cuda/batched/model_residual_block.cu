// A residual block of M models in one pass: the input is read once and the output written once; what lies between the
// two convolutions exists in shared memory only.
//
// A block of threads takes whole images of one model, `images` at a time, and keeps the model's weights of both
// convolutions. Its warps hold all sums of a convolution in registers, so that the result takes the place of its own
// input. A warp computes kRows rows of two octets (8 adjacent pixels of a row, of one image or of two) and kColumns
// channels: 64 sums a thread. A row of two octets is read once for the three rows of the kernel: a product of 16 x 16
// by 16 x 8 takes about 128 bytes of shared memory, one cycle's worth, where reading for each position would take half
// as much again, and for 16 channels twice as much.
//
// In shared memory 8 channels of a pixel are 16 bytes; pixels of 8 channels are adjacent, with a border of zeros around
// each image, so a tap of the kernel is a constant offset and 8 pixels of a row are read without bank conflicts. The
// order of a sum (kernel column, channels, kernel row) follows from the number of channels alone.
#include "cuda/batched/model_residual_block.h"

#include <cuda_runtime.h>

#include "cuda/device/tensor_core.h"

namespace kr {
namespace cuda {
namespace {

template <int C>
struct Shape {
    static constexpr int kColumns = C < 32 ? C : 32, kTiles = kColumns / 8, kRows = 128 / kColumns,
                         kParts = C / kColumns;
    static constexpr int kOctets = C / 8, kWeights = 9 * C * kOctets;  // 16 bytes each, of one convolution
    // Of a block: at 128 registers a thread 16 of them fill a multiprocessor; 64 channels' weights leave room for few
    // images.
    static constexpr int kMostWarps = C < 64 ? 16 : 8;
};

// Distances in shared memory, in units of 16 bytes, and what a block of threads takes.
struct Layout {
    int images, octets, bands;  // at a time; of a row; of kRows rows
    int row, image, plane;
    int warps;
    int64_t shared;
};

template <int C>
Layout layout_of(int height, int width, int images) {
    Layout at;
    at.images = images;
    at.octets = (width + 7) / 8;
    at.bands = (height + Shape<C>::kRows - 1) / Shape<C>::kRows;
    at.row = 8 * at.octets + 2;
    at.image = at.row * (at.bands * Shape<C>::kRows + 2);
    // The planes of a pixel's channels lie in different banks.
    const int apart = 8 / Shape<C>::kOctets;
    at.plane = (images * at.image + 7 - apart) / 8 * 8 + apart;
    at.warps = (images * at.octets + 1) / 2 * at.bands * Shape<C>::kParts;
    at.shared = 16 * ((int64_t)2 * Shape<C>::kWeights + (int64_t)at.plane * Shape<C>::kOctets);
    return at;
}

// The most images that 8 warps can take in `shared` bytes, or where that is none those that 16 can.
template <int C>
int most_images(int height, int width, int64_t shared) {
    for (int warps = 8; warps <= Shape<C>::kMostWarps; warps *= 2) {
        int images = 0;
        for (;; ++images) {
            const Layout next = layout_of<C>(height, width, images + 1);
            if (next.warps > warps || next.shared > shared) break;
        }
        if (images) return images;
    }
    return 0;
}

// sum += the convolution of this warp's octets and channels. `input`: what this lane names of the first row and column
// of the kernel, the first 16 channels; `kernel`: the same of the weights.
template <int C, bool kBf16>
KR_FN void convolve(float (&sum)[Shape<C>::kRows][Shape<C>::kTiles][4], const uint4* input, const uint4* kernel,
                    const Layout& at) {
    using S = Shape<C>;
#pragma unroll 1
    for (int v = 0; v < 3; ++v) {
#pragma unroll 1
        for (int k = 0; k < C / 16; ++k) {
            const int row = opaque(at.row);  // or the addresses of all rows stay in registers
            const uint4* from = input + v + 2 * k * at.plane;
            uint32_t b[3][S::kTiles / 2][4];
#pragma unroll
            for (int u = 0; u < 3; ++u)
#pragma unroll
                for (int t = 0; t < S::kTiles / 2; ++t)
                    load_matrices(b[u][t], kernel + ((u * 3 + v) * S::kOctets + 2 * k) * C + 16 * t);
#pragma unroll
            for (int r = 0; r < S::kRows + 2; ++r, from += row) {
                uint32_t a[4];
                load_matrices(a, from);
#pragma unroll
                for (int u = 0; u < 3; ++u) {
                    const int out = r - u;
                    if (out < 0 || out >= S::kRows) continue;
#pragma unroll
                    for (int t = 0; t < S::kTiles; ++t)
                        multiply_add<kBf16>(sum[out][t], a, b[u][t / 2][t % 2 * 2], b[u][t / 2][t % 2 * 2 + 1]);
                }
            }
        }
    }
}

// use(row, tile, octet) for each word, two channels, that a thread holds of its warp's part.
template <int C, class Use>
KR_FN void each_word(Use&& use) {
#pragma unroll
    for (int r = 0; r < Shape<C>::kRows; ++r)
#pragma unroll
        for (int t = 0; t < Shape<C>::kTiles; ++t)
#pragma unroll
            for (int h = 0; h < 2; ++h) use(r, t, h);
}

// Lane q of four holds word q of four rows of 16 bytes, and gets row q.
KR_FN void transpose(uint32_t (&word)[4], int q) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            if (t & bit) continue;
            const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, q & bit ? word[t] : word[t | bit], bit);
            word[t] = q & bit ? other : word[t];
            word[t | bit] = q & bit ? word[t | bit] : other;
        }
}

// A model's weights of one convolution, [n][tap][octet], to [tap][octet][n]. A warp takes 8 of n, which lie in
// different banks, and 64 bytes of each.
template <int C>
KR_FN void copy_weights(uint4* to, const void* weight, int model, int thread) {
    constexpr int kPositions = 9 * Shape<C>::kOctets, kSquares = (kPositions + 3) / 4 * Shape<C>::kOctets;
    const uint4* from = static_cast<const uint4*>(weight) + (int64_t)model * Shape<C>::kWeights;
    for (int i = thread; i < 32 * kSquares; i += (int)blockDim.x) {
        const int n = i / 32 % Shape<C>::kOctets * 8 + i % 8, position = i / 32 / Shape<C>::kOctets * 4 + i % 32 / 8;
        if (position < kPositions) copy_async(to + position * C + n, from + n * kPositions + position);
    }
}

template <int C, bool kBf16, bool kPre>
__global__ void __launch_bounds__(32 * Shape<C>::kMostWarps, 1)
    residual_block(const ResidualBlock call, const Layout at, int rounds, int shares) {
#if KR_HAS_TENSOR_CORES
    using S = Shape<C>;
    extern __shared__ uint4 shared[];
    uint4 *weights = shared, *pixels = shared + 2 * S::kWeights;
    const int threads = (int)blockDim.x;
    int thread = (int)threadIdx.x;
    // With g = lane / 4 and q = lane % 4 this lane holds of an octet pixel g, and of 8 channels 2 q and 2 q + 1.
    auto lane = [&] { return thread % 32; };
    auto g = [&] { return thread / 4 % 8; };
    auto q = [&] { return thread % 4; };
    int model = (int)blockIdx.x / shares, round = (int)blockIdx.x % shares;

    copy_weights<C>(weights, call.weight1, model, thread);
    copy_weights<C>(weights + S::kWeights, call.weight2, model, thread);
    for (int i = thread; i < at.plane * S::kOctets; i += threads) pixels[i] = {0, 0, 0, 0};
    __syncthreads();  // before pixels of images are copied there

    // This warp's part of the work. Of each octet, in few registers: the image times 2^16, and the column of this
    // lane's pixel; a column past the width, where nothing is stored, if there is no such octet.
    const int part = thread / 32 % S::kParts, pair = thread / 32 / S::kParts / at.bands;
    int spot[2], row0 = thread / 32 / S::kParts % at.bands * S::kRows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int octet = 2 * pair + h, image = octet / at.octets;
        spot[h] = image < at.images ? image << 16 | (octet % at.octets * 8 + g()) : at.octets * 8 + g();
    }
    auto image_of = [&](int h) { return (h ? spot[1] : spot[0]) >> 16; };
    auto column_of = [&](int h) { return (h ? spot[1] : spot[0]) & 0xFFFF; };
    auto place_of = [&](int h) {  // of the octet's first pixel in shared memory
        const int column = column_of(h) - g();
        return image_of(h) * at.image + row0 * at.row + (column < at.octets * 8 ? column : 0);
    };
    auto first_image = [&] { return (int64_t)model * call.images + (int64_t)round * at.images; };  // of all models'
    auto input = [&] { return pixels + place_of(lane() / 8 % 2) + lane() % 8 + lane() / 16 * at.plane; };
    auto kernel = [&](int second) {
        return weights + second * S::kWeights + lane() / 8 % 2 * C + lane() / 16 * 8 + lane() % 8 + part * S::kColumns;
    };
    // Addresses are computed where they are used, or they would fill the registers that hold sums.
    auto forget = [&] {
        thread = opaque(thread), model = opaque(model), round = opaque(round), row0 = opaque(row0);
        spot[0] = opaque(spot[0]), spot[1] = opaque(spot[1]);
    };
    auto word = [&](int h) {  // this lane's channels of the first tile of its pixel in the first row of octet h
        return reinterpret_cast<uint32_t*>(pixels + place_of(h) + at.row + g() + 1 + part * S::kTiles * at.plane) + q();
    };
    auto pixel_of = [&](int h) {  // the same pixel's number among those of all images
        return ((first_image() + image_of(h)) * call.height + row0) * call.width + column_of(h);
    };
    const int channel0 = part * S::kColumns;

    for (; round < rounds; round += shares) {
        auto images_left = [&] { return call.images - (int64_t)round * at.images; };
        auto is_live = [&](int h) { return image_of(h) < images_left(); };
        const int line = call.width * S::kOctets;
        const int live = images_left() < at.images ? (int)images_left() : at.images;
        const uint4* from = static_cast<const uint4*>(call.x) + first_image() * call.height * line;
        auto each_of_mine = [&](auto&& use) {  // what this lane copies: 8 channels of pixels
            for (int i = thread / 32; i < live * call.height; i += threads / 32) {
                const int to = i / call.height * at.image + (i % call.height + 1) * at.row + 1;
                for (int k = lane(); k < line; k += 32)
                    use(pixels + to + k / S::kOctets + k % S::kOctets * at.plane, from + (int64_t)i * line + k);
            }
        };
        each_of_mine([&](uint4* to, const uint4* source) { copy_async(to, source); });
        wait_for_async_copies();
        if (kPre) {
            float scale[8], shift[8];
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                scale[c] = call.scale[(int64_t)model * C + lane() % S::kOctets * 8 + c];
                shift[c] = call.shift[(int64_t)model * C + lane() % S::kOctets * 8 + c];
            }
            each_of_mine([&](uint4* to, const uint4*) {
                uint32_t words[4] = {to->x, to->y, to->z, to->w};
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    words[c] = max_of_halves<kBf16>(
                        pack<kBf16>(fmaf(unpack<kBf16>(words[c]), scale[2 * c], shift[2 * c]),
                                    fmaf(unpack<kBf16>(words[c] >> 16), scale[2 * c + 1], shift[2 * c + 1])),
                        0);
                *to = {words[0], words[1], words[2], words[3]};
            });
        }
        __syncthreads();
        if (round + shares < rounds) {  // its next images; a line of memory is 128 bytes
            const int64_t further = (int64_t)shares * at.images, rest = images_left() - further;
            const int64_t after = (rest < at.images ? rest : at.images) * call.height * line;
            for (int64_t i = 8 * thread; i < after; i += 8 * threads) prefetch(from + further * call.height * line + i);
        }

        float sum[S::kRows][S::kTiles][4];
        uint32_t middle[S::kRows][S::kTiles][2], residual[S::kRows][S::kTiles][2];
        auto biases_of = [&](const float* bias, float (&of)[S::kTiles][2]) {
            const int64_t first = (int64_t)model * C + channel0 + 2 * q();
#pragma unroll
            for (int t = 0; t < S::kTiles; ++t) {
                of[t][0] = bias ? bias[first + 8 * t] : 0.0f;
                of[t][1] = bias ? bias[first + 8 * t + 1] : 0.0f;
            }
        };
        float bias[S::kTiles][2];
        biases_of(call.bias1, bias);
        each_word<C>([&](int r, int t, int h) { sum[r][t][2 * h] = bias[t][0], sum[r][t][2 * h + 1] = bias[t][1]; });
        convolve<C, kBf16>(sum, input(), kernel(0), at);
        each_word<C>([&](int r, int t, int h) {
            middle[r][t][h] = max_of_halves<kBf16>(pack<kBf16>(sum[r][t][2 * h], sum[r][t][2 * h + 1]), 0);
        });
        if (!kPre) {  // what the sum will add is still here
            forget();
            const uint32_t* const from_octet[2] = {word(0), word(1)};
            each_word<C>(
                [&](int r, int t, int h) { residual[r][t][h] = from_octet[h][4 * (r * at.row + t * at.plane)]; });
        }
        __syncthreads();  // all have read what is now overwritten
        forget();
        {
            uint32_t* const to[2] = {word(0), word(1)};
            const uint32_t* const x = static_cast<const uint32_t*>(call.x) + channel0 / 2 + q();
            const uint32_t* const from_x[2] = {x + pixel_of(0) * (C / 2), x + pixel_of(1) * (C / 2)};
            each_word<C>([&](int r, int t, int h) {
                const bool inside = row0 + r < call.height && column_of(h) < call.width;
                if (inside) to[h][4 * (r * at.row + t * at.plane)] = middle[r][t][h];
                if (kPre) residual[r][t][h] = inside && is_live(h) ? from_x[h][r * call.width * (C / 2) + 4 * t] : 0;
            });
        }
        __syncthreads();
        biases_of(call.bias2, bias);
        each_word<C>([&](int r, int t, int h) {
            sum[r][t][2 * h] = bias[t][0] + unpack<kBf16>(residual[r][t][h]);
            sum[r][t][2 * h + 1] = bias[t][1] + unpack<kBf16>(residual[r][t][h] >> 16);
        });
        convolve<C, kBf16>(sum, input(), kernel(1), at);
        forget();
        // Lane q stores 16 bytes: of 32 channels tile q of both octets, of 16 channels tile q % 2 of octet q / 2.
        constexpr int kStores = S::kTiles / 2;
        constexpr uint32_t kLowest = kBf16 ? 0xFF80FF80u : 0xFC00FC00u;  // minus infinity twice
        const uint32_t bound = call.relu ? 0u : kLowest;
        uint4* to[kStores];
        bool stores[kStores];
#pragma unroll
        for (int i = 0; i < kStores; ++i) {
            const int h = kStores == 2 ? i : q() / 2, tile = kStores == 2 ? q() : q() % 2;
            to[i] = static_cast<uint4*>(call.y) + pixel_of(h) * S::kOctets + channel0 / 8 + tile;
            stores[i] = column_of(h) < call.width && is_live(h);
        }
#pragma unroll
        for (int r = 0; r < S::kRows; ++r) {
            uint32_t words[kStores][4];
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int t = 0; t < S::kTiles; ++t)
                    words[kStores == 2 ? h : 0][kStores == 2 ? t : 2 * h + t] =
                        max_of_halves<kBf16>(pack<kBf16>(sum[r][t][2 * h], sum[r][t][2 * h + 1]), bound);
#pragma unroll
            for (int i = 0; i < kStores; ++i) {
                transpose(words[i], q());
                if (row0 + r < call.height && stores[i])
                    to[i][r * call.width * S::kOctets] = {words[i][0], words[i][1], words[i][2], words[i][3]};
            }
        }
        __syncthreads();  // all have read what the next images overwrite
    }
#endif
}

// What a device has: its multiprocessors, and the shared memory that a block of threads may have.
struct Device {
    int processors = 0, shared = 0;
};

cudaError_t get(Device& device) {
    int number = 0, major = 0;
    cudaError_t failed = cudaGetDevice(&number);
    auto ask = [&](int& value, cudaDeviceAttr attribute) {
        if (failed == cudaSuccess) failed = cudaDeviceGetAttribute(&value, attribute, number);
    };
    ask(major, cudaDevAttrComputeCapabilityMajor);
    ask(device.processors, cudaDevAttrMultiProcessorCount);
    ask(device.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (failed == cudaSuccess && major < 8) device.shared = 0;
    return failed;
}

template <int C, bool kBf16, bool kPre>
cudaError_t launch(const ResidualBlock& call, const Device& device, cudaStream_t stream) {
    const auto kernel = residual_block<C, kBf16, kPre>;
    // The device's most, and not what this call needs: another thread may launch for other images at the same time.
    cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared);
    auto slots_for = [&](const Layout& at) {  // blocks of threads that run at once
        int resident = 0;
        if (failed == cudaSuccess)
            failed = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * at.warps, at.shared);
        return (int64_t)device.processors * (resident > 0 ? resident : 1);
    };
    // Few images are spread over all multiprocessors before a block takes several at once.
    const int most = most_images<C>(call.height, call.width, device.shared);
    if (most == 0) return cudaErrorInvalidValue;
    const int64_t each = slots_for(layout_of<C>(call.height, call.width, most)) / call.models;
    const int64_t spread = each > 1 ? (call.images + each - 1) / each : call.images;
    const Layout at = layout_of<C>(call.height, call.width, spread < most ? (int)spread : most);
    const int64_t rounds = (call.images + at.images - 1) / at.images, slots = slots_for(at);
    if (failed != cudaSuccess) return failed;
    // Blocks that share a model: as few as possible, for each loads the weights, of those that end soonest.
    int64_t shares = 1, least = INT64_MAX;
    for (int waves = 1; waves <= 4; ++waves) {
        const int64_t full = waves * slots / call.models, some = full < 1 ? 1 : full < rounds ? full : rounds;
        const int64_t time = (call.models * some + slots - 1) / slots * ((rounds + some - 1) / some);
        if (time < least) shares = some, least = time;
    }
    if (call.models * shares > 0x7FFFFFFF || rounds > 0x3FFFFFFF) return cudaErrorInvalidValue;
    residual_block<C, kBf16, kPre>
        <<<(unsigned)(call.models * shares), 32 * at.warps, at.shared, stream>>>(call, at, (int)rounds, (int)shares);
    return cudaGetLastError();
}

template <int C>
cudaError_t launch(const ResidualBlock& call, const Device& device, cudaStream_t stream) {
    if (call.bf16)
        return call.scale ? launch<C, true, true>(call, device, stream) : launch<C, true, false>(call, device, stream);
    return call.scale ? launch<C, false, true>(call, device, stream) : launch<C, false, false>(call, device, stream);
}

}  // namespace

int residual_block_images(int channels, int height, int width) {
    Device device;
    if (get(device) != cudaSuccess) return 0;
    if (channels == 16) return most_images<16>(height, width, device.shared);
    if (channels == 32) return most_images<32>(height, width, device.shared);
    return channels == 64 ? most_images<64>(height, width, device.shared) : 0;
}

int model_residual_block(const ResidualBlock& call, void* cuda_stream) {
    if (call.models * call.images == 0) return cudaSuccess;
    const auto stream = (cudaStream_t)cuda_stream;
    Device device;
    cudaError_t failed = get(device);
    if (failed == cudaSuccess)
        failed = call.channels == 16   ? launch<16>(call, device, stream)
                 : call.channels == 32 ? launch<32>(call, device, stream)
                 : call.channels == 64 ? launch<64>(call, device, stream)
                                       : cudaErrorInvalidValue;
    if (failed != cudaSuccess) cudaGetLastError();  // it is reported here, and not by the next launch
    return failed;
}

}  // namespace cuda
}  // namespace kr
