// What the parts of the low-latency dispatch kernel share.
#pragma once

#include "kernels/low_latency_launch.h"
#include "kernels/low_latency_rows.cuh"
#include "layout/expert_range.h"
#include "sync/low_latency.cuh"

namespace deep_ep::ll_dispatch {

constexpr int kNumThreads = 512;
constexpr int kNumWarps = kNumThreads / 32;
constexpr int kKept = 2;  // selections of a chunk that a thread keeps; it reads further ones again
constexpr int kScratchBytes = 44 << 10;
constexpr int kItemsPerBlock = 8;  // fewer than there are warps: latency counts
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr auto kKind = LowLatencyKind::kDispatch;

// How the host cut the work.
struct DispatchPlan {
    LowLatencyPart part;
    bool overlaps;     // see may_overlap
    bool in_lines;     // rows travel in lines, a step each
    RowPieces pieces;  // else so
    int num_senders;   // blocks after the announcing one; the others begin with the own rows
    int chunk_words;   // of 32 tokens, which the announcing block counts at a time
    ExpertMap experts;
    SmallDivider by_topk, by_pieces, by_local;  // selections of a token, what a row is sent in, local experts
};

// What the threads of a block share.
struct BlockState {
    uint64_t epoch;
    unsigned room;      // ranks, as bits, whose set this operation may write
    unsigned absent;    // sources, as bits, that are known to take no part while counts are awaited
    unsigned present;   // sources that take part
    unsigned in_lines;  // sources whose rows come in lines
    int num_items;
    // By turn: the sources from the own rank on; where the source's pieces begin among all of this rank.
    int first_item[kMaxPeers];
    int num_tokens[kMaxPeers];
    int num_pieces[kMaxPeers];
    SmallDivider by_pieces[kMaxPeers];
    int piece_steps[kMaxPeers];
    uint64_t waited_ns[kMaxPeers];
};

__device__ __forceinline__ int set_of(uint64_t epoch) {
    return static_cast<int>(epoch % kNumSets);
}

// One block tells what was consumed, waits the longest, and writes what is not by rows. The last one, as block 0 comes late.
__device__ __forceinline__ bool is_leader() {
    return blockIdx.x == gridDim.x - 1;
}

// Waits for leave to write. By the first warp of every block, whose first thread knows the epoch, before the block's first
// store; the others know after a block barrier.
__device__ __forceinline__ void begin_block(const LowLatencyDomain& ll, uint64_t epoch, BlockState& block) {
    const int peer = static_cast<int>(threadIdx.x);
    const bool is_peer = peer < ll.domain.num_ranks;
    sync::Room room{};
    if (is_peer) room = sync::peek_room(ll, kKind, peer);
    epoch = __shfl_sync(kAllLanes, epoch, 0);
    const bool may = is_peer && sync::await_room(ll, kKind, epoch, peer, room) == sync::Came::kHere;
    const unsigned all = __ballot_sync(kAllLanes, may);
    if (peer == 0) {
        block.epoch = epoch;
        block.room = all;
    }
}

// The expert of a selection; -1 for none, and for one that does not exist.
__device__ __forceinline__ int existing(const LowLatencyDispatchArgs& args, int64_t given) {
    return given >= 0 && given < args.num_experts ? static_cast<int>(given) : -1;
}

__device__ __forceinline__ int64_t selection(const LowLatencyDispatchArgs& args, int64_t i) {
    return args.topk_is_int64 ? static_cast<const int64_t*>(args.topk_idx)[i]
                              : static_cast<const int32_t*>(args.topk_idx)[i];
}

}  // namespace deep_ep::ll_dispatch
