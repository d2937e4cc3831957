// How calls of get_dispatch_layout (bindings_layout.cpp) reach the kernel: C functions, as for low-latency calls, so that tests
// give functions of their own.
#pragma once

#include <cstdint>

namespace deep_ep {

// Addresses as integers.
struct LayoutArguments {
    uintptr_t topk_idx;
    int64_t is_int64, num_tokens, num_topk, num_experts;
    uintptr_t per_rank, per_expert, in_rank;
};

struct LayoutEntry {
    void* owner;
    // Before the launch. -1: kernels have reported a failure, and nothing was done. 1: the stream is being captured into a
    // graph. 0: it is not, and waits for the operation before.
    int (*begin)(void* owner, uintptr_t stream);
    // captured: what `begin` said.
    void (*launch)(void* owner, const LayoutArguments* arguments, uintptr_t stream, bool captured);
};

}  // namespace deep_ep
