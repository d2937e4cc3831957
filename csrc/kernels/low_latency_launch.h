// Arguments and launches of the low-latency kernels, free of CUDA headers.
#pragma once

#include <cstdint>

#include "kernels/launch.h"
#include "layout/low_latency_layout.h"

namespace deep_ep {

// Loaded when a buffer is constructed: loading a kernel at its first launch may wait for kernels that run.
void prepare_low_latency_dispatch();
void prepare_low_latency_combine();

// An operation is one launch, or, with a receive hook, two: the send part waits for nobody but for leave to use the set.
enum class LowLatencyPart : int { kWhole = 0, kSend = 1, kReceive = 2 };

// L local experts, R ranks, M the largest number of tokens of a rank in this call (at most the region's), K selections.
//
// expert_major: a received token gets a row for each local expert that it selected, packed by expert. Else it gets one row,
// that of (source, token), and positions tells which experts want it.
struct LowLatencyDispatchArgs {
    LowLatencyDomain ll;
    uint64_t signature;
    // What this rank sends.
    const uint8_t* x;      // bf16 [num_tokens, hidden]
    const void* topk_idx;  // int32 or int64 [num_tokens, K]
    bool topk_is_int64;
    const float* topk_weights;  // [num_tokens, K], or null: combine sends them
    int num_tokens;
    int num_topk;
    int num_experts;
    int num_max_tokens;  // M
    int hidden;          // multiple of 8, with FP8 of 128
    bool use_fp8;
    ScaleFormat format;
    bool expert_major;
    // What it receives. By source instead of by expert: rows [R, M, hidden], scales [R, S, M], recv_count [R] as source_tokens,
    // no src_info and no layout_range.
    uint8_t* rows;           // bf16 or E4M3 [L, R * M, hidden]
    uint32_t* scales;        // [L, S, R * M]: tokens innermost; or null
    int32_t* recv_count;     // [L]
    int32_t* src_info;       // [L, R * M]
    int64_t* layout_range;   // [L, R]: first row << 32 | number
    int32_t* source_tokens;  // [R]: tokens of each source, 0 for one that takes no part
    // [R, M, K], of the tokens that the sources have: see pack_position. By source: the local expert, -1 for none, also for
    // tokens that a source does not have.
    int32_t* positions;
    float* weights;       // [R, M, K] where positions has a row, by source 0 elsewhere; or null
    int32_t* recv_stats;  // [L] to add the tokens of each expert to, or null
    int64_t* wait_stats;  // [R] to add nanoseconds to, or null
    uint64_t* ticket;  // of one operation: its epoch, from the send part to the receive part; null for kWhole
};
void launch_low_latency_dispatch(const LowLatencyDispatchArgs& args, LowLatencyPart part, int num_sms,
                                 Stream stream);

struct LowLatencyCombineArgs {
    LowLatencyDomain ll;
    uint64_t signature;
    bool expert_major;  // of the dispatch
    // As a rank with experts, for all homes. By source instead of by expert: x [R, M, hidden] of sums, which travel as they are
    // and leave before any home was heard; neither src_info nor layout_range nor any weights; positions always.
    const uint8_t* x;              // bf16 [L, R * M, hidden]
    const int32_t* src_info;       // [L, R * M], of the dispatch
    const int64_t* layout_range;   // [L, R]
    const int32_t* source_tokens;  // [R]; null without positions, and by source where they are not known
    // [R, M, K]; null: rows are looked up in src_info, and leave in the receive part, so x must stay as it is until then.
    const int32_t* positions;
    // [R, M, K] that came with the dispatch, with positions; else null. With it rows are summed and leave before any home was
    // heard, so what a home selects must be what it selected in the dispatch.
    const float* weights;
    // As a home.
    const void* topk_idx;  // [num_tokens, K], -1 to leave a selection out
    bool topk_is_int64;
    const float* topk_weights;  // [num_tokens, K]
    int num_tokens;
    int num_topk;
    int num_experts;
    int num_max_tokens;  // M of the dispatch
    int hidden;
    bool sum_at_home;     // rows travel one by one, and are summed in FP32 in k order
    bool use_logfmt;      // on all ranks: rows travel one by one in LogFMT-10, and weights do not count
    uint8_t* out;         // bf16 [num_tokens, hidden]
    int64_t* wait_stats;  // [R] to add nanoseconds to, or null
    uint64_t* ticket;     // as for dispatch
};
void launch_low_latency_combine(const LowLatencyCombineArgs& args, LowLatencyPart part, int num_sms,
                                Stream stream);

// Whether the next low-latency kernel may take SMs while this one runs: where other buffers or ranks use the GPU too, those
// SMs are for kernels that this one may be waiting for. num_sms: this rank's share.
inline bool may_overlap(const Domain& domain, int num_sms) {
    return num_sms >= domain.num_sms;
}

// This rank takes part in an operation without tokens: the others are told that it refused.
void launch_low_latency_refuse(const LowLatencyDomain& ll, LowLatencyKind kind, Stream stream);

}  // namespace deep_ep
