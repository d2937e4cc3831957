// Where the rows of a dispatch go, and what travels beside them: common to the kernels that place rows.
#pragma once

#include <cstdint>

#include "kernels/peer_launch.h"
#include "layout/expert_range.h"
#include "sync/exchange.cuh"

namespace deep_ep {

// Addresses at one peer for this operation.
struct Destination {
    uint8_t* rows;
    uint8_t* scales;
    uint8_t* topk_idx;
    float* topk_weights;
    int32_t* src_idx;
    int64_t capacity;
    ExpertRange experts;  // of the peer
};

template <class T>
__device__ T* at(uint8_t* base, int64_t offset) {
    return offset < 0 ? nullptr : reinterpret_cast<T*>(base + offset);
}

// The own output's place, for every peer; by the whole of block 0.
__device__ inline void announce_outputs(const DispatchRowsArgs& args, uint64_t epoch) {
    const int peer = static_cast<int>(threadIdx.x);
    if (peer >= args.domain.num_ranks) return;
    Announcement* message = sync::open_announcement(args.domain, peer, epoch);
    message->signature = args.signature;
    message->rows = args.output.rows;
    message->scales = args.output.scales;
    message->topk_idx = args.output.topk_idx;
    message->topk_weights = args.output.topk_weights;
    message->src_idx = args.output.src_idx;
    message->capacity = args.output.capacity;
    sync::publish(args.domain, peer, epoch);
}

// Waits for all peers and fills `destinations` (shared memory). By all threads of a block; the same answer for all.
__device__ inline bool await_destinations(const DispatchRowsArgs& args, uint64_t epoch,
                                          Destination* destinations) {
    const Domain& domain = args.domain;
    bool here = true;
    if (threadIdx.x < domain.num_ranks) {
        const int peer = static_cast<int>(threadIdx.x);
        here = sync::await_announcement(domain, peer, epoch, args.signature, Operation::kDispatch);
        if (here) {
            const Announcement* theirs = sync::announcement(domain, peer, domain.rank, epoch);
            uint8_t* base = domain.base[peer];
            destinations[peer] = {at<uint8_t>(base, theirs->rows),
                                  at<uint8_t>(base, theirs->scales),
                                  at<uint8_t>(base, theirs->topk_idx),
                                  at<float>(base, theirs->topk_weights),
                                  at<int32_t>(base, theirs->src_idx),
                                  theirs->capacity,
                                  expert_range(args.num_experts, domain.num_ranks, peer)};
        }
    }
    return __syncthreads_and(here) != 0;
}

template <class Index>
__device__ void send_topk(const DispatchRowsArgs& args, const Destination& to, int token, int64_t row,
                          int lane) {
    const ExpertRange range = to.experts;
    for (int k = lane; k < args.num_topk; k += 32) {
        const int64_t i = static_cast<int64_t>(token) * args.num_topk + k;
        const Index expert = static_cast<const Index*>(args.topk_idx)[i];
        const bool local = expert >= range.first && expert < range.first + range.count;
        reinterpret_cast<Index*>(to.topk_idx)[row * args.num_topk + k] =
            local ? expert - range.first : Index{-1};
        to.topk_weights[row * args.num_topk + k] = local ? args.topk_weights[i] : 0.0f;
    }
}

// What goes with a row besides its scales, by ordinary stores of the warp.
__device__ inline void send_routing(const DispatchRowsArgs& args, const Destination& to, int token,
                                    int64_t row, int lane) {
    if (to.src_idx != nullptr && lane == 0) to.src_idx[row] = token;
    if (to.topk_idx == nullptr) return;
    if (args.topk_is_int64) {
        send_topk<int64_t>(args, to, token, row, lane);
    } else {
        send_topk<int32_t>(args, to, token, row, lane);
    }
}

}  // namespace deep_ep
