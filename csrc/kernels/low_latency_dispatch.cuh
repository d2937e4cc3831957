// What the parts of the low-latency dispatch kernel share.
#pragma once

#include "kernels/low_latency_launch.h"
#include "kernels/low_latency_rows.cuh"
#include "layout/expert_range.h"
#include "ptx/bulk_copy.cuh"
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
    bool overlaps;                      // see may_overlap
    bool in_lines;                      // rows travel in lines, a step each
    RowPieces pieces;                   // else so
    int num_senders;                    // blocks after the announcing one; the others begin with the own rows
    int first_receiver, num_receivers;  // blocks that take pieces
    int chunk_words;                    // of 32 tokens, which the announcing block counts at a time
    ExpertMap experts;
    SmallDivider by_topk, by_pieces, by_local;  // selections of a token, what a row is sent in, local experts
    RowShape shape;

    // Of a row as this rank sends it.
    __device__ __forceinline__ int num_pieces() const { return by_pieces.divisor; }
    __device__ __forceinline__ int piece_steps() const { return in_lines ? 1 : pieces.bytes / kStepBytes; }
};

// What the threads of a block share.
struct BlockState {
    uint64_t epoch;
    uint64_t heard;       // barrier at which its hearing warp arrives: the headers of all sources are there
    uint64_t counted;     // barrier at which all its threads arrive: the counts are
    unsigned has_failed;  // to hear of a source
    unsigned room;        // ranks, as bits, whose set this operation may write
    unsigned absent;      // sources, as bits, that are known to take no part while counts are awaited
    unsigned present;     // sources that take part
    unsigned in_lines;    // sources whose rows come in lines
    int num_items;
    // By turn: the sources from the own rank on; where the source's pieces begin among all of this rank.
    int first_item[kMaxPeers];
    int num_tokens[kMaxPeers];
    int num_pieces[kMaxPeers];
    SmallDivider by_pieces[kMaxPeers];
    int piece_steps[kMaxPeers];
    const uint8_t* entries[kMaxPeers];  // where the source's lie
    const uint8_t* lines[kMaxPeers];
    uint64_t waited_ns[kMaxPeers];

    // By one thread, before a block barrier.
    __device__ __forceinline__ void clear() {
        absent = in_lines = has_failed = 0;
        ptx::mbarrier_init(&heard, 32);
        ptx::mbarrier_init(&counted, kNumThreads);
    }
};

__device__ __forceinline__ int set_of(uint64_t epoch) {
    return static_cast<int>(epoch % kNumSets);
}

// Of a block: hears the headers, and in the block of is_leader() tells what was consumed. Neither among the first warps, which
// send, nor the last, which receive.
constexpr int kHearingWarp = kNumWarps / 2 - 1;

// One block tells what was consumed, waits the longest, and writes what is not by rows. The last one, as block 0 comes late.
__device__ __forceinline__ bool is_leader() {
    return blockIdx.x == gridDim.x - 1;
}

// Waits for leave to write, and in block 0 tells each peer how many tokens come, which the host knows. By the first warp of
// every block, whose first thread knows the epoch, before the block's first store; the others know after a block barrier.
//
// early: kernels ahead in the stream may still run; what is written here lies in a set that nobody reads any more. False if
// there is no leave yet, as it is not yet time for a deadline. Not where ranks may be masked, which kernels ahead may change.
__device__ __forceinline__ bool begin_block(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                                            uint64_t epoch, bool early, BlockState& block) {
    const LowLatencyDomain& ll = args.ll;
    const int peer = static_cast<int>(threadIdx.x);
    epoch = __shfl_sync(kAllLanes, epoch, 0);
    sync::Room room{};
    if (!sync::peek_rooms(ll, kKind, epoch, early, room) && early) return false;
    const bool may =
        peer < ll.domain.num_ranks && sync::await_room(ll, kKind, epoch, peer, room) == sync::Came::kHere;
    if (may && blockIdx.x == 0) {
        sync::publish_header(ll, kKind, peer, epoch,
                             {signature_tag(args.signature), args.num_tokens,
                              plan.in_lines ? 0 : plan.pieces.count, plan.pieces.bytes / kStepBytes});
    }
    const unsigned all = __ballot_sync(kAllLanes, may);
    if (peer == 0) {
        block.epoch = epoch;
        block.room = all;
    }
    return true;
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
