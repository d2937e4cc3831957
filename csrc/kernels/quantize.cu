#include <algorithm>

#include "kernels/launch.h"
#include "layout/elements.cuh"
#include "runtime/errors.h"

namespace deep_ep {
namespace {

constexpr int kNumThreads = 256;
constexpr int kNumWarps = kNumThreads / 32;
constexpr int kPerLane = kTile / 32;
constexpr int64_t kMaxGrid = 0x7FFFFFFF;

// A lane's four channels of a tile; channels past the row are zeros.
template <class E>
__device__ __forceinline__ Pack<typename E::Storage, kPerLane> load_lane(const typename E::Storage* x,
                                                                         int64_t begin, int64_t channels,
                                                                         bool vectorized) {
    using Values = Pack<typename E::Storage, kPerLane>;
    if (vectorized) return begin < channels ? *reinterpret_cast<const Values*>(x + begin) : Values{};
    Values values{};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        if (begin + i < channels) values.v[i] = x[begin + i];
    }
    return values;
}

template <class T>
__device__ __forceinline__ void store_lane(T* out, Pack<T, kPerLane> values, int64_t begin, int64_t channels,
                                           bool vectorized) {
    if (vectorized) {
        if (begin < channels) *reinterpret_cast<Pack<T, kPerLane>*>(out + begin) = values;
        return;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        if (begin + i < channels) out[begin + i] = values.v[i];
    }
}

// A warp a tile, four channels a lane. Packed scales: a warp takes the four tiles of a word, so that one thread owns it.
template <class E, ScaleFormat kFormat>
__global__ void __launch_bounds__(kNumThreads)
    dispatch_quantize_1x128(const __grid_constant__ QuantizeRowsArgs args) {
    constexpr int kTilesPerWarp = kFormat == ScaleFormat::kUe8m0 ? kTilesPerWord : 1;
    const int lane = threadIdx.x % 32;
    const int64_t tiles = num_tiles(args.channels);
    const int64_t columns = num_scale_columns(args.channels, kFormat);
    const int64_t units = args.num_rows * columns;
    for (int64_t unit = blockIdx.x * static_cast<int64_t>(kNumWarps) + threadIdx.x / 32; unit < units;
         unit += static_cast<int64_t>(gridDim.x) * kNumWarps) {
        const int64_t row = unit / columns, column = unit % columns;
        const auto* x = static_cast<const typename E::Storage*>(args.x) + row * args.x_stride;
        uint8_t* q = args.q + row * args.q_stride;
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < kTilesPerWarp; ++i) {
            const int64_t tile = column * kTilesPerWarp + i;
            if (tile >= tiles) break;  // the same for the whole warp
            const int64_t begin = tile * kTile + lane * kPerLane;
            const auto values = load_lane<E>(x, begin, args.channels, args.vectorized);
            float amax = 0.0f;
            // fmaxf returns the other operand when one is NaN: NaN is ignored.
#pragma unroll
            for (int j = 0; j < kPerLane; ++j) amax = fmaxf(amax, fabsf(E::widen(values.v[j])));
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) {
                amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, offset));
            }
            const TileScale s = tile_scale(amax, kFormat != ScaleFormat::kFp32);
            Pack<uint8_t, kPerLane> codes;
#pragma unroll
            for (int j = 0; j < kPerLane; ++j)
                codes.v[j] = to_e4m3(__fmul_rn(E::widen(values.v[j]), s.inverse));
            store_lane(q, codes, begin, args.channels, args.vectorized);
            const uint32_t bits = __float_as_uint(s.scale);
            word = kFormat == ScaleFormat::kUe8m0 ? word | (bits >> 23) << (8 * i) : bits;
        }
        if (lane == 0) {
            static_cast<uint32_t*>(
                args.scales)[row * args.scales_row_stride + column * args.scales_column_stride] = word;
        }
    }
}

template <class E>
__global__ void __launch_bounds__(kNumThreads)
    dispatch_dequantize_1x128(const __grid_constant__ DequantizeRowsArgs args) {
    const int lane = threadIdx.x % 32;
    const int64_t tiles = num_tiles(args.channels);
    const int64_t units = args.num_rows * tiles;
    const auto* scales = static_cast<const uint32_t*>(args.scales);
    for (int64_t unit = blockIdx.x * static_cast<int64_t>(kNumWarps) + threadIdx.x / 32; unit < units;
         unit += static_cast<int64_t>(gridDim.x) * kNumWarps) {
        const int64_t row = unit / tiles, tile = unit % tiles;
        const int64_t column = args.scales_packed ? tile / kTilesPerWord : tile;
        const uint32_t word = scales[row * args.scales_row_stride + column * args.scales_column_stride];
        const uint32_t bits =
            args.scales_packed ? ((word >> (8 * (tile % kTilesPerWord))) & 0xFFu) << 23 : word;
        const float scale = __uint_as_float(bits);
        const int64_t begin = tile * kTile + lane * kPerLane;
        const uint8_t* q = args.q + row * args.q_stride;
        Pack<uint8_t, kPerLane> codes{};
        if (args.vectorized) {
            if (begin < args.channels) codes = *reinterpret_cast<const Pack<uint8_t, kPerLane>*>(q + begin);
        } else {
#pragma unroll
            for (int j = 0; j < kPerLane; ++j) {
                if (begin + j < args.channels) codes.v[j] = q[begin + j];
            }
        }
        Pack<typename E::Storage, kPerLane> values;
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) values.v[j] = E::round(__fmul_rn(from_e4m3(codes.v[j]), scale));
        auto* out = static_cast<typename E::Storage*>(args.out) + row * args.out_stride;
        store_lane(out, values, begin, args.channels, args.vectorized);
    }
}

unsigned num_blocks(int64_t units) {
    return static_cast<unsigned>(std::min(ceil_div(units, kNumWarps), kMaxGrid));
}

template <class E>
void quantize(const QuantizeRowsArgs& args, ScaleFormat format, cudaStream_t stream) {
    const unsigned blocks = num_blocks(args.num_rows * num_scale_columns(args.channels, format));
    switch (format) {
        case ScaleFormat::kFp32:
            dispatch_quantize_1x128<E, ScaleFormat::kFp32><<<blocks, kNumThreads, 0, stream>>>(args);
            break;
        case ScaleFormat::kPow2:
            dispatch_quantize_1x128<E, ScaleFormat::kPow2><<<blocks, kNumThreads, 0, stream>>>(args);
            break;
        case ScaleFormat::kUe8m0:
            dispatch_quantize_1x128<E, ScaleFormat::kUe8m0><<<blocks, kNumThreads, 0, stream>>>(args);
            break;
    }
    check_launch("dispatch_quantize_1x128");
}

template <class E>
void dequantize(const DequantizeRowsArgs& args, cudaStream_t stream) {
    dispatch_dequantize_1x128<E>
        <<<num_blocks(args.num_rows * num_tiles(args.channels)), kNumThreads, 0, stream>>>(args);
    check_launch("dispatch_dequantize_1x128");
}

// Whether a lane's four values, of `value_bytes` and of one byte, lie at addresses that one access can take.
bool lanes_aligned(const void* values, int64_t values_stride, int64_t value_bytes, const uint8_t* codes,
                   int64_t codes_stride, int64_t channels) {
    return channels % kPerLane == 0 && values_stride % kPerLane == 0 && codes_stride % kPerLane == 0 &&
           reinterpret_cast<uintptr_t>(values) % (kPerLane * value_bytes) == 0 &&
           reinterpret_cast<uintptr_t>(codes) % kPerLane == 0;
}

}  // namespace

void launch_dispatch_quantize_1x128(QuantizeRowsArgs args, ElementType in, ScaleFormat format,
                                    Stream stream) {
    if (args.num_rows == 0 || args.channels == 0) return;
    args.vectorized =
        lanes_aligned(args.x, args.x_stride, element_bytes(in), args.q, args.q_stride, args.channels);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    switch (in) {
        case ElementType::kBf16:
            return quantize<Bf16>(args, format, cuda_stream);
        case ElementType::kFp16:
            return quantize<Fp16>(args, format, cuda_stream);
        case ElementType::kFp32:
            return quantize<Fp32>(args, format, cuda_stream);
    }
}

void launch_dispatch_dequantize_1x128(DequantizeRowsArgs args, ElementType out, Stream stream) {
    if (args.num_rows == 0 || args.channels == 0) return;
    args.vectorized =
        lanes_aligned(args.out, args.out_stride, element_bytes(out), args.q, args.q_stride, args.channels);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    switch (out) {
        case ElementType::kBf16:
            return dequantize<Bf16>(args, cuda_stream);
        case ElementType::kFp16:
            return dequantize<Fp16>(args, cuda_stream);
        case ElementType::kFp32:
            return dequantize<Fp32>(args, cuda_stream);
    }
}

}  // namespace deep_ep
