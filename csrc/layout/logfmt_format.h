// Which rows travel in LogFMT-10 and in what form, shared by the CPU loops and the CUDA kernels so that the two cannot
// disagree. The format stands in deep_ep/logfmt.py, the arithmetic of its codes in logfmt_math.inl.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout/fp8_format.h"
#include "layout/host_device.h"

namespace deep_ep {

constexpr int kLogFmtPlainHidden = 512;         // rows that do not divide by this travel plain
constexpr int kLogFmtSideBytes = 4;             // bf16 max, bf16 min of a group of kTile values
constexpr float kLogFmtSmallestMax = 0x1p-90f;  // keeps max / 2^32 a normal float

// Magnitudes that the codes of a group span; for a group that is cast both are normal floats, and min < max < 1.
struct LogFmtGroup {
    float max, min;

    // Of the largest and smallest magnitude as bf16 bits.
    DEEP_EP_HOST_DEVICE static LogFmtGroup of(uint16_t max_bits, uint16_t min_bits) {
        const uint32_t words[2] = {static_cast<uint32_t>(max_bits) << 16, static_cast<uint32_t>(min_bits)
                                                                              << 16};
        float values[2];
        memcpy(values, words, sizeof(values));
        const float least = values[0] * 0x1p-32f;
        return {values[0], values[1] < least ? least : values[1]};
    }

    // The only thing that decides a chunk's form, which all its groups must allow: sender and receiver both read it from
    // the magnitudes. A NaN's bits are above every number's, so its group fails `max < 1`.
    DEEP_EP_HOST_DEVICE bool can_be_cast() const {
        return max < 1.0f && max >= kLogFmtSmallestMax && min < max;
    }
};

DEEP_EP_HOST_DEVICE bool logfmt_travels_plain(int64_t hidden) {
    return hidden % kLogFmtPlainHidden != 0;
}

// Values that are cast together or not at all.
DEEP_EP_HOST_DEVICE int logfmt_chunk(int64_t hidden) {
    return hidden % 1024 == 0 ? 1024 : 512;
}

}  // namespace deep_ep
