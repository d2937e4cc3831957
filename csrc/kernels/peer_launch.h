// Arguments and launches of the kernels that move rows between peers' memory, free of CUDA headers.
#pragma once

#include <cstdint>

#include "kernels/launch.h"
#include "layout/control_block.h"

namespace deep_ep {

// Each kernel is loaded when a buffer is constructed: loading it at its first launch may wait for kernels that run.
void prepare_dispatch_layout();
void prepare_dispatch_notify();
void prepare_dispatch_rows();
void prepare_dispatch_rows_fp8();
void prepare_dispatch_refuse();
void prepare_dispatch_combine_copy();
void prepare_combine_rows();

// Counts of topk_idx: per rank and per expert, and which rank each token goes to. One pass.
struct DispatchLayoutArgs {
    Domain domain;
    const void* topk_idx;  // int32 or int64 [num_tokens, num_topk]
    bool topk_is_int64;
    int num_tokens;
    int num_topk;
    int num_experts;
    int32_t* num_tokens_per_rank;
    int32_t* num_tokens_per_expert;
    uint8_t* is_token_in_rank;  // bool [num_tokens, num_ranks]
};
void launch_dispatch_layout(const DispatchLayoutArgs& args, Stream stream);

// Where this rank wants its rows, as offsets into its heap; -1 for an absent tensor.
struct OutputOffsets {
    int64_t rows;
    int64_t scales;
    int64_t topk_idx;
    int64_t topk_weights;
    int64_t src_idx;
    int64_t capacity;
};

// Uncached dispatch: exchange counts and output places, and write the handle.
struct DispatchNotifyArgs {
    Domain domain;
    uint64_t signature;
    OutputOffsets output;
    bool fixed_capacity;  // the capacity is all there will be: what does not fit is an overflow
    int num_tokens;
    int num_experts;
    int num_channels;
    const int32_t* num_tokens_per_expert;
    const uint8_t* is_token_in_rank;
    int32_t* rank_prefix_matrix;          // [R, R]
    int32_t* channel_prefix_matrix;       // [R, C]
    int32_t* recv_channel_prefix_matrix;  // [R, C]
    int32_t* send_head;                   // [T, R]
};
void launch_dispatch_notify(const DispatchNotifyArgs& args, Stream stream);

// Place rows into the peers' outputs.
struct DispatchRowsArgs {
    Domain domain;
    uint64_t signature;
    bool
        announce;  // cached: tell the peers where this rank's outputs lie; otherwise dispatch_notify has done so
    OutputOffsets output;
    int num_tokens;
    const int32_t* send_head;  // [T, R]: row at each rank, or -1
    const uint8_t* rows;
    int64_t row_bytes;      // multiple of 16, also the stride
    const uint8_t* scales;  // of any strides, also with tokens innermost; at the peers they are row-major
    int scales_per_token;   // 4-byte elements
    int64_t scales_token_stride;  // elements
    int64_t scales_stride;
    const void* topk_idx;
    bool topk_is_int64;
    const float* topk_weights;
    int num_topk;
    int num_experts;
    // dispatch_rows_fp8: the rows are of `type` and quantised on the way; row_bytes is that of the result, a multiple of
    // 128, `scales` is null and scales_per_token the number of 4-byte words that `format` gives.
    ElementType type;
    ScaleFormat format;
};
void launch_dispatch_rows(const DispatchRowsArgs& args, int num_sms, Stream stream);
void launch_dispatch_rows_fp8(const DispatchRowsArgs& args, int num_sms, Stream stream);

// This rank takes part in an operation without moving anything: the others are told that it refused.
void launch_dispatch_refuse(const Domain& domain, Stream stream);

// Copies within this rank's memory, on the SMs of the call. Addresses and sizes are multiples of 16 bytes.
constexpr int kMaxSegments = 8;
struct CopySegmentsArgs {
    struct Segment {
        const uint8_t* from;  // null: fill with bytes of 0xFF
        uint8_t* to;
        int64_t bytes;
    };
    Segment segments[kMaxSegments];
    int num_segments;
};
void launch_dispatch_combine_copy(const CopySegmentsArgs& args, int num_sms, Stream stream);

// Sum the rows of each token. Those of a peer are read from its heap, or, if it announces no rows, come into this rank's
// inbox by the peer's copy engine, source after source, each in the order of its own rows.
struct CombineRowsArgs {
    Domain domain;
    uint64_t signature;
    const uint8_t* rows;     // this rank's, [num_recv, hidden]
    int64_t rows_offset;     // the same in its heap, -1: they are pushed to the peers
    const float* weights;    // or null
    int64_t weights_offset;  // or -1
    uint64_t push_number;    // of this combine among those that may push, 0: this one may not
    uint8_t* inbox;
    const int32_t* rank_prefix;  // [R, R], of the handle: says where each source's rows start
    int num_tokens;
    const int32_t* send_head;
    int64_t hidden;
    ElementType type;
    const uint8_t* biases[2];
    int num_biases;
    uint8_t* out;
    int num_topk;
    float* out_weights;
};
void launch_combine_rows(const CombineRowsArgs& args, int num_sms, Stream stream);

}  // namespace deep_ep
