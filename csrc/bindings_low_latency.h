// How low-latency calls (bindings_low_latency_calls.cpp) reach the plans they are for: C functions, since integers that pass
// through Python on the way cost more than all else that a launch needs, and tests give functions of their own.
#pragma once

#include <cstdint>

namespace deep_ep {

// Addresses as integers, 0 for none.
struct LowLatencyDispatchArguments {
    uintptr_t x, topk_idx, topk_weights;
    int64_t num_tokens;
    uintptr_t rows, scales;  // scales: 0 for bf16 rows
    uintptr_t small;         // block of the small outputs
    uintptr_t recv_stats, wait_stats;
};
// By source src_info, layout_range and topk_weights may be 0 too.
struct LowLatencyCombineArguments {
    uintptr_t x, src_info, layout_range, source_tokens, positions, weights, topk_idx, topk_weights;
    int64_t num_tokens;
    uintptr_t out, wait_stats, ticket;
};

struct LowLatencyEntry {
    void* plan;
    // Before an operation. -1: kernels have reported a failure, and nothing was done. 1: the stream is being captured into a
    // graph. 0: it is not, and waits for the operation before.
    int (*begin)(void* plan, uintptr_t stream);
    // arguments: of the operation's kind. part: a LowLatencyPart. captured: what `begin` said.
    void (*launch)(void* plan, const void* arguments, int part, int num_sms, uintptr_t stream, bool captured);
};

}  // namespace deep_ep
