// Where the rows of a dispatch go, and what travels beside them: common to the kernels that place rows.
#pragma once

#include <cstdint>

#include "kernels/peer_launch.h"
#include "layout/expert_range.h"
#include "ptx/grid.cuh"
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

// The epoch of this operation, once a block may look for the peers' outputs; 0 after a failure. By all threads of a block.
__device__ inline uint64_t begin_rows(const DispatchRowsArgs& args) {
    if (args.announce) {
        ptx::wait_for_earlier_kernels();
        const uint64_t epoch = sync::own_control(args.domain)->epoch + 1;
        if (blockIdx.x == 0) announce_outputs(args, epoch);
        return epoch;
    }
    // dispatch_notify, the kernel before this one, announces; this one does not wait for its end.
    __shared__ uint64_t epoch;
    if (threadIdx.x == 0) epoch = sync::await_routing(args.domain);
    __syncthreads();
    // Bulk copies see the rows, which kernels before wrote, through another proxy than what was acquired.
    ptx::fence_proxy_async();
    return epoch;
}

// Waits until send_head may be read. By all threads of a block; the same answer for all.
__device__ inline bool await_places(const DispatchRowsArgs& args, uint64_t epoch) {
    if (args.announce) return true;
    return __syncthreads_and(threadIdx.x != 0 || sync::await_routed(args.domain, epoch)) != 0;
}

// The end of the operation; by all threads, after their bulk stores have completed.
__device__ inline void end_rows(const DispatchRowsArgs& args, uint64_t epoch) {
    // That of dispatch_notify as well, which may still tell the host: it reads announcements until then.
    ptx::wait_for_earlier_kernels();
    if (epoch == 0) epoch = sync::own_control(args.domain)->epoch + 1;
    sync::finish(args.domain, epoch, Operation::kDispatch);
}

// Waits for all peers and fills `destinations` (shared memory). By all threads of a block; the same answer for all.
__device__ inline bool await_destinations(const DispatchRowsArgs& args, uint64_t epoch,
                                          Destination* destinations) {
    const Domain& domain = args.domain;
    bool here = epoch != 0;
    if (here && threadIdx.x < domain.num_ranks) {
        const int peer = static_cast<int>(threadIdx.x);
        here = sync::await_announcement(domain, peer, epoch, Operation::kDispatch);
        const sync::Terms theirs = sync::terms(domain, peer, epoch);
        here = here && sync::agrees(domain, peer, args.signature, theirs.signature, Operation::kDispatch);
        if (here) {
            uint8_t* base = domain.base[peer];
            destinations[peer] = {at<uint8_t>(base, theirs.rows),
                                  at<uint8_t>(base, theirs.scales),
                                  at<uint8_t>(base, theirs.topk_idx),
                                  at<float>(base, theirs.topk_weights),
                                  at<int32_t>(base, theirs.src_idx),
                                  theirs.capacity,
                                  expert_range(args.num_experts, domain.num_ranks, peer)};
        }
    }
    return __syncthreads_and(here) != 0;
}

// The selections of a token that travel beside its row, one for each lane: read while rows before it are under way.
struct Routing {
    int64_t expert;
    float weight;
};

__device__ __forceinline__ int64_t expert_of(const DispatchRowsArgs& args, int64_t i) {
    return args.topk_is_int64 ? static_cast<const int64_t*>(args.topk_idx)[i]
                              : static_cast<const int32_t*>(args.topk_idx)[i];
}

__device__ __forceinline__ Routing read_routing(const DispatchRowsArgs& args, int token, int lane) {
    Routing routing{-1, 0.0f};
    if (args.topk_idx != nullptr && token < args.num_tokens && lane < args.num_topk) {
        const int64_t i = static_cast<int64_t>(token) * args.num_topk + lane;
        routing = {expert_of(args, i), args.topk_weights[i]};
    }
    return routing;
}

// What goes with a row besides its scales, by ordinary stores of the warp.
__device__ inline void send_routing(const DispatchRowsArgs& args, const Destination& to, int token,
                                    int64_t row, const Routing& routing, int lane) {
    if (to.src_idx != nullptr && lane == 0) to.src_idx[row] = token;
    if (to.topk_idx == nullptr) return;
    const ExpertRange range = to.experts;
    Routing now = routing;
    for (int k = lane; k < args.num_topk; k += 32) {
        if (k != lane) {  // more than 32 selections
            const int64_t i = static_cast<int64_t>(token) * args.num_topk + k;
            now = {expert_of(args, i), args.topk_weights[i]};
        }
        const bool local = now.expert >= range.first && now.expert < range.first + range.count;
        const int64_t expert = local ? now.expert - range.first : -1, at = row * args.num_topk + k;
        if (args.topk_is_int64) {
            reinterpret_cast<int64_t*>(to.topk_idx)[at] = expert;
        } else {
            reinterpret_cast<int32_t*>(to.topk_idx)[at] = static_cast<int32_t>(expert);
        }
        to.topk_weights[at] = local ? now.weight : 0.0f;
    }
}

}  // namespace deep_ep
