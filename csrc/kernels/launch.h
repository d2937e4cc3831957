// Arguments and launches of the kernels, free of CUDA headers: what bindings and other host code include.
#pragma once

#include <cstdint>

#include "layout/fp8_format.h"

namespace deep_ep {

// An opaque cudaStream_t.
using Stream = void*;

// Rows as bytes; strides in bytes. A row whose index lies outside [0, num_x_rows) becomes zeros: the values are on the
// device, where no caller waits for an error.
struct GatherRowsArgs {
    const uint8_t* x;
    int64_t num_x_rows;
    int64_t x_stride;
    const void* index;
    bool index_is_int64;
    int64_t num_rows;
    int64_t row_bytes;
    uint8_t* out;
    int64_t out_stride;
};
void launch_dispatch_gather_rows(const GatherRowsArgs& args, Stream stream);

struct ReduceSource {
    const void* rows;
    int64_t num_rows;
    int64_t stride;  // bytes
};

constexpr int kMaxReduceColumns = 128;  // 3 KB of the 4 KB that kernel arguments may take on any device
constexpr int kMaxReduceBiases = 2;

// The sum of deep_ep.ops.reduce_rows. A slot outside [0, num_rows of its column) counts as absent.
struct ReduceRowsArgs {
    ReduceSource columns[kMaxReduceColumns];
    ReduceSource biases[kMaxReduceBiases];
    int num_columns;
    int num_biases;
    const int32_t* slots;
    int64_t slots_stride;  // elements
    const float* weights;  // or null
    int64_t weights_stride;
    int64_t num_tokens;
    int64_t hidden;
    int round_every;
    void* out;
    int64_t out_stride;  // bytes
    bool vectorized;     // set by the launch: every row address is a multiple of 16 bytes
};
void launch_combine_reduce_rows(ReduceRowsArgs args, ElementType in, ElementType out, Stream stream);

// 1x128 tiles; strides in elements.
struct QuantizeRowsArgs {
    const void* x;
    int64_t x_stride;
    int64_t num_rows;
    int64_t channels;
    uint8_t* q;
    int64_t q_stride;
    void* scales;
    int64_t scales_row_stride;
    int64_t scales_column_stride;
    bool vectorized;  // set by the launch
};
void launch_dispatch_quantize_1x128(QuantizeRowsArgs args, ElementType in, ScaleFormat format, Stream stream);

struct DequantizeRowsArgs {
    const uint8_t* q;
    int64_t q_stride;
    int64_t num_rows;
    int64_t channels;
    const void* scales;
    int64_t scales_row_stride;
    int64_t scales_column_stride;
    bool scales_packed;
    void* out;
    int64_t out_stride;
    bool vectorized;  // set by the launch
};
void launch_dispatch_dequantize_1x128(DequantizeRowsArgs args, ElementType out, Stream stream);

}  // namespace deep_ep
