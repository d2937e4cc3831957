// Where the small results of a low-latency dispatch lie in the block of ordinary memory that the host cuts for them. (Rows
// and scales are tensors of their own.) Shared with the host's tensors by deep_ep._C.
#pragma once

#include <cstdint>

#include "layout/low_latency_layout.h"

namespace deep_ep {

// In bytes from the start of their block. Where rows lie by source there are no src_info and layout_range, recv_count is [R],
// and positions are what the caller gets in place of src_info.
struct LowLatencyOutputs {
    // layout_range int64 [L, R] at 0, then the ticket of a call with a receive hook.
    int64_t ticket_at;
    int64_t recv_count_at;     // int32 [L]
    int64_t src_info_at;       // int32 [L, R * M]
    int64_t source_tokens_at;  // int32 [R]
    int64_t positions_at;      // int32 [R, M, K]
    int64_t weights_at;        // float32 [R, M, K], with weights
    int64_t small_block_bytes;

    static LowLatencyOutputs make(int64_t num_local, int64_t num_ranks, int64_t num_max_tokens,
                                  int64_t num_topk, bool with_weights, bool expert_major) {
        constexpr auto kPadded = &LowLatencyLayout::padded;
        const int64_t capacity = num_ranks * num_max_tokens;
        LowLatencyOutputs outputs{};
        outputs.ticket_at = expert_major ? num_local * num_ranks * 8 : 0;
        outputs.recv_count_at = kPadded(outputs.ticket_at + 8);
        outputs.src_info_at = outputs.recv_count_at + kPadded((expert_major ? num_local : num_ranks) * 4);
        outputs.source_tokens_at =
            outputs.src_info_at + (expert_major ? kPadded(num_local * capacity * 4) : 0);
        outputs.positions_at = outputs.source_tokens_at + kPadded(num_ranks * 4);
        if (!expert_major) outputs.src_info_at = outputs.positions_at;
        const int64_t table_bytes = kPadded(capacity * num_topk * 4);
        outputs.weights_at = outputs.positions_at + table_bytes;
        outputs.small_block_bytes = outputs.weights_at + (with_weights ? table_bytes : 0);
        return outputs;
    }
};

}  // namespace deep_ep
