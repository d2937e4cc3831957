// The innermost CPU loops, one row (or tile) a call. They are compiled once per instruction set and chosen at run
// time, so a wheel built on one machine runs at full speed, and correctly, on another.
#pragma once

#include <cstdint>

#include "layout/fp8_format.h"
#include "layout/logfmt_format.h"

namespace deep_ep::cpu {

// One row that takes part in a sum. `closes_group` ends a group of a two-level sum.
struct RowTerm {
    const void* row;
    float weight;
    bool closes_group;
};

struct ReduceRow {
    const RowTerm* biases;
    int num_biases;
    const RowTerm* terms;
    int num_terms;
    bool grouped;  // group partials are rounded to the output type before they are added
    int64_t hidden;
    void* out;
};

struct TransposeTile {
    const void* x;  // first token, first channel of the tile
    int64_t x_stride;
    int num_tokens;    // at most kTile
    int num_channels;  // at most kTransposeChannels
    bool pow2;
    uint8_t* q;  // channel-major: q[channel * q_stride + token]
    int64_t q_stride;
    float* scales;  // one a channel
};

constexpr int kTransposeChannels = 64;

struct RowLoops {
    const char* name;
    // All indexed by ElementType: reduce by [input][output], quantise by input, dequantise by output.
    void (*reduce_row[kNumElementTypes][kNumElementTypes])(const ReduceRow& args);
    void (*quantize_row[kNumElementTypes])(const void* x, int64_t channels, bool pow2, uint8_t* q,
                                           float* scales);
    void (*dequantize_row[kNumElementTypes])(const uint8_t* q, int64_t channels, const float* scales,
                                             void* out);
    // A block of at most 128 x 128 under one scale, which is returned.
    float (*quantize_block[kNumElementTypes])(const void* x, int64_t x_stride, int rows, int columns,
                                              bool pow2, uint8_t* q, int64_t q_stride);
    void (*quantize_transposed_tile[kNumElementTypes])(const TransposeTile& args);
    // 128 bf16 values to codes (sign in bit 9) and back.
    void (*logfmt_encode_group)(const uint16_t* x, LogFmtGroup group, uint16_t* codes);
    void (*logfmt_decode_group)(const uint16_t* codes, LogFmtGroup group, uint16_t* x);
};

// The best version this processor runs, or the one DEEP_EP_CPU_ISA names (generic, avx2, avx512).
const RowLoops& row_loops();

extern const RowLoops kGenericLoops;
#if defined(__x86_64__)
extern const RowLoops kAvx2Loops;
extern const RowLoops kAvx512Loops;
#endif

}  // namespace deep_ep::cpu
