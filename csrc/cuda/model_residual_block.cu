// A residual block of M models in one pass: the input is read once and the output written once; what lies between the
// two convolutions exists in shared memory only.
//
// A block of threads takes whole images of one model, `images` at a time, and keeps the model's weights of both
// convolutions. Its warps hold all sums of a convolution in registers, so that the result takes the place of its own
// input. A warp computes kRows rows of two octets (8 adjacent pixels of a row, of one image or of two) and kColumns
// channels: 64 sums a thread. A row of two octets is read once for the three rows of the kernel, which halves the
// reads: per product of 16 x 16 by 16 x 8 shared memory gives 128 bytes, one cycle's worth.
//
// In shared memory 8 channels of a pixel are 16 bytes; pixels of 8 channels are adjacent, with a border of zeros around
// each image, so a tap of the kernel is a constant offset and 8 pixels of a row are read without bank conflicts. The
// order of a sum (kernel column, channels, kernel row) follows from the number of channels alone.
#include "cuda/model_residual_block.h"

#include <cuda_runtime.h>

#include "cuda/tensor_core.h"

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

template <int C, bool kBf16, bool kPre>
__global__ void __launch_bounds__(32 * Shape<C>::kMostWarps, 1)
    residual_block(const ResidualBlock call, const Layout at, int rounds, int shares) {
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

    // Weights [n][tap][octet] to [tap][octet][n]: a warp takes 8 of n, which lie in different banks, and 64 bytes of
    // each.
    constexpr int kPlaces = 9 * S::kOctets, kSquares = (kPlaces + 3) / 4 * S::kOctets;
    for (int i = thread; i < 2 * 32 * kSquares; i += threads) {
        const int second = i / (32 * kSquares), square = i / 32 % kSquares;
        const int n = square % S::kOctets * 8 + i % 8, place = square / S::kOctets * 4 + i % 32 / 8;
        const uint4* from =
            static_cast<const uint4*>(second ? call.weight2 : call.weight1) + (int64_t)model * S::kWeights;
        if (place < kPlaces) copy_aside(weights + second * S::kWeights + place * C + n, from + n * kPlaces + place);
    }
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
    auto word = [&](int r, int t, int h) {  // the two channels of this lane in tile t of its pixel in row r of octet h
        const int at_pixel = place_of(h) + (r + 1) * at.row + g() + 1 + (part * S::kTiles + t) * at.plane;
        return reinterpret_cast<uint32_t*>(pixels + at_pixel) + q();
    };
    const int channel0 = part * S::kColumns;

    for (; round < rounds; round += shares) {
        const int64_t left = call.images - (int64_t)round * at.images;
        const int live = left < at.images ? (int)left : at.images;
        const int line = call.width * S::kOctets;
        const uint4* from = static_cast<const uint4*>(call.x) + first_image() * call.height * line;
        auto each_of_mine = [&](auto&& use) {  // what this lane copies: 8 channels of pixels
            for (int i = thread / 32; i < live * call.height; i += threads / 32) {
                const int to = i / call.height * at.image + (i % call.height + 1) * at.row + 1;
                for (int k = lane(); k < line; k += 32)
                    use(pixels + to + k / S::kOctets + k % S::kOctets * at.plane, from + (int64_t)i * line + k);
            }
        };
        each_of_mine([&](uint4* to, const uint4* source) { copy_aside(to, source); });
        wait_for_copies_aside();
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
                    words[c] = relu<kBf16>(
                        pack<kBf16>(fmaf(unpack<kBf16>(words[c]), scale[2 * c], shift[2 * c]),
                                    fmaf(unpack<kBf16>(words[c] >> 16), scale[2 * c + 1], shift[2 * c + 1])));
                *to = {words[0], words[1], words[2], words[3]};
            });
        }
        __syncthreads();
        if (round + shares < rounds) {  // its next images; a line of memory is 128 bytes
            const int64_t further = (int64_t)shares * at.images, rest = left - further;
            const int64_t after = (rest < at.images ? rest : at.images) * call.height * line;
            for (int64_t i = 8 * thread; i < after; i += 8 * threads) prefetch(from + further * call.height * line + i);
        }

        float sum[S::kRows][S::kTiles][4];
        uint32_t middle[S::kRows][S::kTiles][2], residual[S::kRows][S::kTiles][2];
        auto begin = [&](const float* bias) {
#pragma unroll
            for (int t = 0; t < S::kTiles; ++t) {
                const float* both = bias + (int64_t)model * C + channel0 + 8 * t + 2 * q();
                const float low = bias ? both[0] : 0.0f, high = bias ? both[1] : 0.0f;
#pragma unroll
                for (int r = 0; r < S::kRows; ++r)
                    sum[r][t][0] = sum[r][t][2] = low, sum[r][t][1] = sum[r][t][3] = high;
            }
        };
        begin(call.bias1);
        convolve<C, kBf16>(sum, input(), kernel(0), at);
#pragma unroll
        for (int r = 0; r < S::kRows; ++r)
#pragma unroll
            for (int t = 0; t < S::kTiles; ++t)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    middle[r][t][h] = relu<kBf16>(pack<kBf16>(sum[r][t][2 * h], sum[r][t][2 * h + 1]));
        forget();
#pragma unroll
        for (int r = 0; r < S::kRows; ++r)
#pragma unroll
            for (int t = 0; t < S::kTiles; ++t)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (!kPre) residual[r][t][h] = *word(r, t, h);
        __syncthreads();  // all have read what is now overwritten
        forget();
#pragma unroll
        for (int r = 0; r < S::kRows; ++r)
#pragma unroll
            for (int t = 0; t < S::kTiles; ++t)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const bool inside = row0 + r < call.height && column_of(h) < call.width;
                    if (inside) *word(r, t, h) = middle[r][t][h];
                    if (!kPre) continue;
                    const bool exists = inside && image_of(h) < live;
                    const int64_t pixel =
                        ((first_image() + image_of(h)) * call.height + row0 + r) * call.width + column_of(h);
                    const uint32_t* words = static_cast<const uint32_t*>(call.x) + pixel * (C / 2) + channel0 / 2 + q();
                    residual[r][t][h] = exists ? words[4 * t] : 0;
                }
        __syncthreads();
        begin(call.bias2);
#pragma unroll
        for (int r = 0; r < S::kRows; ++r)
#pragma unroll
            for (int t = 0; t < S::kTiles; ++t)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    sum[r][t][2 * h] += unpack<kBf16>(residual[r][t][h]);
                    sum[r][t][2 * h + 1] += unpack<kBf16>(residual[r][t][h] >> 16);
                }
        convolve<C, kBf16>(sum, input(), kernel(1), at);
        forget();
#pragma unroll
        for (int r = 0; r < S::kRows; ++r) {
            uint32_t words[2][4];  // of 16 channels both octets' tiles fill one
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int t = 0; t < S::kTiles; ++t) {
                    const uint32_t found = pack<kBf16>(sum[r][t][2 * h], sum[r][t][2 * h + 1]);
                    words[S::kTiles == 4 ? h : 0][S::kTiles == 4 ? t : 2 * h + t] =
                        call.relu ? relu<kBf16>(found) : found;
                }
#pragma unroll
            for (int i = 0; i < S::kTiles / 2; ++i) {
                transpose(words[i], q());
                const int h = S::kTiles == 4 ? i : q() / 2, tile = S::kTiles == 4 ? q() : q() % 2;
                if (row0 + r >= call.height || column_of(h) >= call.width || image_of(h) >= live) continue;
                const int64_t pixel =
                    ((first_image() + image_of(h)) * call.height + row0 + r) * call.width + column_of(h);
                uint4* to = static_cast<uint4*>(call.y) + pixel * S::kOctets + channel0 / 8 + tile;
                *to = {words[i][0], words[i][1], words[i][2], words[i][3]};
            }
        }
        __syncthreads();  // all have read what the next images overwrite
    }
}

template <int C, bool kBf16, bool kPre>
int launch(const ResidualBlock& call, int most_images, cudaStream_t stream) {
    const Layout at = layout_of<C>(call.height, call.width, most_images);
    auto kernel = residual_block<C, kBf16, kPre>;
    cudaError_t failed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)at.shared);
    if (failed != cudaSuccess) return failed;
    int device = 0, processors = 0, resident = 0;
    if ((failed = cudaGetDevice(&device)) != cudaSuccess) return failed;
    failed = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (failed != cudaSuccess) return failed;
    failed = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * at.warps, at.shared);
    if (failed != cudaSuccess) return failed;
    // Blocks that run at once, so that weights are loaded once for as many images as possible.
    const int64_t rounds = (call.images + at.images - 1) / at.images;
    const int64_t wanted = (int64_t)processors * (resident > 0 ? resident : 1) / call.models;
    const int64_t shares = wanted < 1 ? 1 : wanted < rounds ? wanted : rounds;
    if (call.models * shares > 0x7FFFFFFF || rounds > 0x3FFFFFFF) return cudaErrorInvalidValue;
    residual_block<C, kBf16, kPre>
        <<<(unsigned)(call.models * shares), 32 * at.warps, at.shared, stream>>>(call, at, (int)rounds, (int)shares);
    return cudaGetLastError();
}

template <int C>
int launch(const ResidualBlock& call, int images, cudaStream_t stream) {
    if (call.bf16)
        return call.scale ? launch<C, true, true>(call, images, stream) : launch<C, true, false>(call, images, stream);
    return call.scale ? launch<C, false, true>(call, images, stream) : launch<C, false, false>(call, images, stream);
}

}  // namespace

int residual_block_images(int channels, int height, int width) {
    int device = 0, major = 0, shared = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess || major < 8)
        return 0;
    if (channels == 16) return most_images<16>(height, width, shared);
    if (channels == 32) return most_images<32>(height, width, shared);
    return channels == 64 ? most_images<64>(height, width, shared) : 0;
}

int model_residual_block(const ResidualBlock& call, void* cuda_stream) {
    if (call.models * call.images == 0) return cudaSuccess;
    const int images = residual_block_images(call.channels, call.height, call.width);
    if (images == 0) return cudaErrorInvalidValue;
    auto stream = (cudaStream_t)cuda_stream;
    if (call.channels == 16) return launch<16>(call, images, stream);
    return call.channels == 32 ? launch<32>(call, images, stream) : launch<64>(call, images, stream);
}

}  // namespace cuda
}  // namespace kr
