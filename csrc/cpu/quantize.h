// FP8 (E4M3) quantisation on the CPU. The rule stands in deep_ep/fp8.py.
#pragma once

#include <cstdint>

#include "layout/fp8_format.h"

namespace deep_ep::cpu {

// Strides in elements unless named otherwise. Scales: [num_rows, num_scale_columns(channels, format)], float or int32.
struct QuantizeRows {
    const void* x;
    int64_t x_stride;
    ElementType in;
    int64_t num_rows;
    int64_t channels;
    uint8_t* q;
    int64_t q_stride;
    void* scales;
    int64_t scales_row_stride;
    int64_t scales_column_stride;
    ScaleFormat format;
};
void quantize_rows(const QuantizeRows& args);

// scale_rows: consecutive rows that share a row of scales, 1 for 1x128 tiles and 128 for 128x128 blocks.
struct DequantizeRows {
    const uint8_t* q;
    int64_t q_stride;
    int64_t num_rows;
    int64_t channels;
    const void* scales;
    int64_t scales_row_stride;
    int64_t scales_column_stride;
    bool scales_packed;
    int scale_rows;
    ElementType out_type;
    void* out;
    int64_t out_stride;
};
void dequantize_rows(const DequantizeRows& args);

// One matrix [num_rows, channels] in 128x128 blocks; float scales [ceil(num_rows / 128), num_tiles(channels)].
struct QuantizeBlocks {
    const void* x;
    int64_t x_stride;
    ElementType in;
    int64_t num_rows;
    int64_t channels;
    bool pow2;
    uint8_t* q;
    float* scales;
};
void quantize_blocks(const QuantizeBlocks& args);

// x [num_tokens, channels] to q [channels, num_tokens] with tiles of 128 tokens.
struct QuantizeTransposed {
    const void* x;
    int64_t x_stride;
    ElementType in;
    int64_t num_tokens;
    int64_t channels;
    uint8_t* q;
    void* scales;
    int64_t scales_row_stride;
    int64_t scales_column_stride;
    ScaleFormat format;
};
void quantize_transposed(const QuantizeTransposed& args);

}  // namespace deep_ep::cpu
