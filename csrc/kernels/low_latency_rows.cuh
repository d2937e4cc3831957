// A row in the registers of a warp, in the form in which it travels in low-latency operations: quantised, or as it is.
#pragma once

#include <cstdint>

#include "layout/elements.cuh"
#include "layout/low_latency_layout.h"
#include "sync/low_latency.cuh"

namespace deep_ep {

// kStepBytes of a row: lane l holds the 16 bytes from `half * 512 + l * 16` on. With FP8, the first lanes also hold the
// words of the step's scales, one each.
struct RowStep {
    uint4 halves[2];
    uint32_t scale_word;
};

// What a step is made of: columns in bf16, twice as many bytes if they are to be quantised.
template <bool kFp8>
struct SourceStep {
    uint4 v[kFp8 ? 4 : 2];
};

// Of a row as it travels. `scale_words`: of the row; `step_words`: of a step.
struct RowShape {
    int num_bytes;  // without scales
    int num_steps;
    int scale_words;
    int step_words;

    DEEP_EP_HOST_DEVICE static RowShape of(int hidden, bool use_fp8, ScaleFormat format) {
        const int num_bytes = use_fp8 ? hidden : 2 * hidden;
        const int num_steps = (num_bytes + kStepBytes - 1) / kStepBytes;
        if (!use_fp8) return {num_bytes, num_steps, 0, 0};
        return {num_bytes, num_steps, static_cast<int>(num_scale_columns(hidden, format)),
                static_cast<int>(num_scale_columns(kStepBytes, format))};
    }
    // Where a lane's 16 bytes of a half lie in the row.
    DEEP_EP_HOST_DEVICE int at(int step, int half, int lane) const {
        return step * kStepBytes + half * (kStepBytes / 2) + lane * 16;
    }
};

constexpr int kHalfLines = 32 / kLineLanes;  // of a half of a step
constexpr int kTileLanes16 = kTile / 16;     // lanes that hold a tile at 16 columns each

// A step of a bf16 row. What lies past its end is zero.
template <bool kFp8>
__device__ __forceinline__ SourceStep<kFp8> load_source(const uint8_t* x, const RowShape& shape, int step,
                                                        int lane) {
    constexpr int kPerHalf = kFp8 ? 2 : 1;
    SourceStep<kFp8> source{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = shape.at(step, half, lane);
        if (at >= shape.num_bytes) continue;
        const auto* from = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(at) * kPerHalf);
#pragma unroll
        for (int i = 0; i < kPerHalf; ++i) source.v[half * kPerHalf + i] = from[i];
    }
    return source;
}

// Eight codes of E4M3. The instruction saturates at 448, and makes 0x7F of a NaN of either sign, as to_e4m3 does.
__device__ __forceinline__ uint2 quantize_eight(const uint4& bf16, float inverse) {
    float values[8];
    widen_vector<Bf16, 8>(*reinterpret_cast<const Pack<uint16_t, 8>*>(&bf16), values);
    Pack<uint16_t, 4> codes;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        codes.v[i / 2] = __nv_cvt_float2_to_fp8x2(
            make_float2(__fmul_rn(values[i], inverse), __fmul_rn(values[i + 1], inverse)), __NV_SATFINITE,
            __NV_E4M3);
    }
    return *reinterpret_cast<const uint2*>(&codes);
}

// Called, as it happens rarely.
__device__ __noinline__ inline TileScale tile_scale_apart(float amax, bool pow2) {
    return tile_scale(amax, pow2);
}

// By all lanes of a warp: eight lanes share a tile.
template <bool kFp8>
__device__ __forceinline__ RowStep encode(const SourceStep<kFp8>& source, const RowShape& shape, int step,
                                          ScaleFormat format, int lane) {
    if constexpr (!kFp8) {
        return {{source.v[0], source.v[1]}, 0};
    } else {
        constexpr unsigned kAll = 0xFFFFFFFFu;
        RowStep result;
        uint32_t bits[2];
        // Each line for both halves, as a warp that is alone on its SM waits for every result.
        float amax[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Magnitude<Bf16> magnitude;
            magnitude.add(*reinterpret_cast<const Pack<uint16_t, 8>*>(&source.v[2 * half]));
            magnitude.add(*reinterpret_cast<const Pack<uint16_t, 8>*>(&source.v[2 * half + 1]));
            amax[half] = magnitude.get();
        }
#pragma unroll
        for (int offset = kTileLanes16 / 2; offset > 0; offset /= 2) {
            const float others[2] = {__shfl_xor_sync(kAll, amax[0], offset),
                                     __shfl_xor_sync(kAll, amax[1], offset)};
            amax[0] = fmaxf(amax[0], others[0]);
            amax[1] = fmaxf(amax[1], others[1]);
        }
        const bool pow2 = format != ScaleFormat::kFp32;
        TileScale scales[2] = {plain_tile_scale(amax[0], pow2), plain_tile_scale(amax[1], pow2)};
        if (fmaxf(amax[0], amax[1]) > kPlainAmax) {
#pragma unroll
            for (int half = 0; half < 2; ++half) scales[half] = tile_scale_apart(amax[half], pow2);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint2 low = quantize_eight(source.v[2 * half], scales[half].inverse);
            const uint2 high = quantize_eight(source.v[2 * half + 1], scales[half].inverse);
            result.halves[half] = {low.x, low.y, high.x, high.y};
            bits[half] = __float_as_uint(scales[half].scale);
        }
        // Each word to the lane that stores it.
        if (format == ScaleFormat::kUe8m0) {
            uint32_t words[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // Bytes of a packed word past the row's tiles are zero.
                const bool has = lane % kTileLanes16 == 0 && shape.at(step, half, lane) < shape.num_bytes;
                words[half] = __reduce_or_sync(kAll, has ? bits[half] >> 23 << lane / kTileLanes16 * 8 : 0u);
            }
            result.scale_word = lane == 0 ? words[0] : words[1];
        } else {
            constexpr int kHalfTiles = kStepBytes / 2 / kTile;
            const int from = lane % kHalfTiles * kTileLanes16;
            const uint32_t first = __shfl_sync(kAll, bits[0], from),
                           second = __shfl_sync(kAll, bits[1], from);
            result.scale_word = lane < kHalfTiles ? first : second;
        }
        return result;
    }
}

// A step that has travelled. Plain loads: peers wrote it.
__device__ __forceinline__ RowStep load_step(const uint8_t* row, const uint32_t* scales,
                                             const RowShape& shape, int step, int lane) {
    RowStep result{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = shape.at(step, half, lane);
        if (at < shape.num_bytes) result.halves[half] = *reinterpret_cast<const uint4*>(row + at);
    }
    const int word = step * shape.step_words + lane;
    if (lane < shape.step_words && word < shape.scale_words) result.scale_word = scales[word];
    return result;
}

// `scale_stride`: elements between the scales of a row.
__device__ __forceinline__ void store_step(const RowStep& what, uint8_t* row, uint32_t* scales,
                                           int64_t scale_stride, const RowShape& shape, int step, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = shape.at(step, half, lane);
        if (at < shape.num_bytes) *reinterpret_cast<uint4*>(row + at) = what.halves[half];
    }
    const int word = step * shape.step_words + lane;
    if (lane < shape.step_words && word < shape.scale_words) scales[word * scale_stride] = what.scale_word;
}

// A step in lines, see kStepLines. `row`: where those of its row begin. By all lanes of a warp, as everything below.
__device__ __forceinline__ void send_step(const RowStep& what, uint8_t* row, int step, uint64_t epoch,
                                          int lane) {
    constexpr unsigned kAll = 0xFFFFFFFFu;
    const auto tag = static_cast<uint32_t>(epoch);
    const int from = lane % kHalfLines * kLineLanes + kLineLanes - 1;
    const uint32_t first = __shfl_sync(kAll, what.halves[0].w, from),
                   second = __shfl_sync(kAll, what.halves[1].w, from);
    uint8_t* at = row + step * kLineStepBytes + lane * 16;
    __syncwarp();  // the lanes of a line store and load it together
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint4 part = what.halves[half];
        if (lane % kLineLanes == kLineLanes - 1) part.w = tag;
        ptx::st_line(at + half * (kStepBytes / 2), part, true);
    }
    ptx::st_line(at + kStepBytes, {lane < kHalfLines ? first : second, what.scale_word, 0, tag},
                 lane < kLineLanes);
}

// What lies where a step's lines come.
struct PeekedStep {
    uint4 halves[2];
    uint4 rest;  // of the first lanes

    __device__ __forceinline__ bool is_here(uint64_t epoch, int lane) const {
        const bool half_is = sync::is_here(halves[0], epoch) && sync::is_here(halves[1], epoch);
        return (lane % kLineLanes != kLineLanes - 1 || half_is) &&
               (lane >= kLineLanes || sync::is_here(rest, epoch));
    }
    __device__ __forceinline__ RowStep step(int lane) const {
        constexpr unsigned kAll = 0xFFFFFFFFu;
        RowStep result{{halves[0], halves[1]}, rest.y};
        const uint32_t first = __shfl_sync(kAll, rest.x, lane / kLineLanes),
                       second = __shfl_sync(kAll, rest.x, kHalfLines + lane / kLineLanes);
        if (lane % kLineLanes == kLineLanes - 1) result.halves[0].w = first, result.halves[1].w = second;
        return result;
    }
};

__device__ __forceinline__ PeekedStep peek_step(const uint8_t* row, int step, int lane) {
    const uint8_t* at = row + step * kLineStepBytes + lane * 16;
    __syncwarp();
    return {{ptx::ld_line(at, true), ptx::ld_line(at + kStepBytes / 2, true)},
            ptx::ld_line(at + kStepBytes, lane < kLineLanes)};
}

// Waits for the rest of a step from `from`; one answer for all lanes.
__device__ __forceinline__ sync::Came await_step(const LowLatencyDomain& ll, LowLatencyKind kind, int from,
                                                 uint64_t epoch, const uint8_t* row, int step, int lane,
                                                 PeekedStep& peeked) {
    if (sync::takes_unawaited(ll.domain)) return sync::Came::kHere;
    return sync::wait_by_warp(ll, kind, Phase::kPushed, from, epoch, peeked.is_here(epoch, lane), [&] {
        peeked = peek_step(row, step, lane);
        return peeked.is_here(epoch, lane);
    });
}

}  // namespace deep_ep
