// Arguments and launches of the kernels that move rows between peers' memory, free of CUDA headers.
#pragma once

#include <cstdint>

#include "kernels/launch.h"
#include "layout/control_block.h"

namespace deep_ep {

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
    const int32_t* num_tokens_per_rank;
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
    int64_t row_bytes;  // multiple of 16, also the stride
    const uint8_t* scales;
    int scales_per_token;         // 4-byte elements
    int64_t scales_token_stride;  // elements
    int64_t scales_stride;
    const void* topk_idx;
    bool topk_is_int64;
    const float* topk_weights;
    int num_topk;
    int num_experts;
};
void launch_dispatch_rows(const DispatchRowsArgs& args, int num_sms, Stream stream);

// Read the rows of each token from the peers and sum them.
struct CombineRowsArgs {
    Domain domain;
    uint64_t signature;
    int64_t rows_offset;     // of this rank's rows in its heap
    int64_t weights_offset;  // or -1
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
