// Constants and address arithmetic of the FP8 payload, shared by the CPU loops and the CUDA kernels so that the
// two cannot disagree.
#pragma once

#include <cstdint>

#include "layout/host_device.h"

namespace deep_ep {

// Element type of rows that are summed or quantised. The numbers are the wire between Python and C++.
enum class ElementType : int { kBf16 = 0, kFp16 = 1, kFp32 = 2 };
constexpr int kNumElementTypes = 3;

// kFp32: scale = amax / 448. kPow2: that, rounded up to a power of two, as a float. kUe8m0: the power of two as its
// biased exponent, one byte a tile, four tiles to an int32 word (tile 4i + j is byte j of word i).
enum class ScaleFormat : int { kFp32 = 0, kPow2 = 1, kUe8m0 = 2 };
constexpr int kNumScaleFormats = 3;

constexpr int kTile = 128;           // channels that share a scale
constexpr float kE4m3Max = 448.0f;   // largest finite E4M3 value
constexpr float kAmaxFloor = 1e-4f;  // keeps an all-zero tile from dividing by zero
constexpr int kTilesPerWord = 4;

DEEP_EP_HOST_DEVICE int element_bytes(ElementType type) {
    return type == ElementType::kFp32 ? 4 : 2;
}

DEEP_EP_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
DEEP_EP_HOST_DEVICE constexpr int64_t num_tiles(int64_t channels) {
    return ceil_div(channels, kTile);
}

// Columns of the scale tensor of rows with `channels` channels: 7168 channels are 56 tiles, or 14 packed words.
DEEP_EP_HOST_DEVICE constexpr int64_t num_scale_columns(int64_t channels, ScaleFormat format) {
    return format == ScaleFormat::kUe8m0 ? ceil_div(num_tiles(channels), kTilesPerWord) : num_tiles(channels);
}

}  // namespace deep_ep
