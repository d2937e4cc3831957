// Order between ranks in low-latency operations: flags that are epochs, waits that end, and leave to use a slot again.
// Beside sync/exchange.cuh, whose failures, delays and planted bugs it shares; what is waited for lies in the region.
//
//   what                        release                       acquire
//   a header and what follows   publish_header()              await_header()
//   a piece of a row            publish_piece()               await_piece()
//   leave to use a set again    finish_receive()              await_room()
//
// A rank sends at most two operations of a kind ahead of what a peer has consumed, and the sets alternate, so a set is
// free when the peer has consumed the epoch two before. That also keeps a header from being overwritten while it is read.
//
// A rank that does not come is a failure, or, where ranks may be masked, it is left out: see Came.
#pragma once

#include <cstdint>

#include "layout/low_latency_layout.h"
#include "ptx/memory.cuh"
#include "sync/exchange.cuh"

namespace deep_ep::sync {

// How a wait for a peer ended. After kFailed nothing more is waited for: the operation only ends.
enum class Came : int { kHere = 0, kMasked = 1, kFailed = 2 };

// Longest waits of a block by peer, in shared memory; zero at first.
struct LongestWaits {
    unsigned long long ns[kMaxPeers];
};

__device__ __forceinline__ LowLatencyControl* low_latency_control(const LowLatencyDomain& ll, int rank) {
    return reinterpret_cast<LowLatencyControl*>(ll.region[rank]);
}

__device__ __forceinline__ LowLatencyControl* own_low_latency_control(const LowLatencyDomain& ll) {
    return low_latency_control(ll, ll.domain.rank);
}

__device__ __forceinline__ Operation operation_of(LowLatencyKind kind) {
    return kind == LowLatencyKind::kDispatch ? Operation::kDispatch : Operation::kCombine;
}

// Number of the operation that this kernel begins. Every block reads it before it arrives at the kernel's end, where the
// last one advances it.
__device__ __forceinline__ uint64_t next_epoch(const LowLatencyDomain& ll, LowLatencyKind kind) {
    const uint64_t* epoch = &own_low_latency_control(ll)->epoch[static_cast<int>(kind)];
    return *reinterpret_cast<const volatile uint64_t*>(epoch) + 1;
}

__device__ __forceinline__ bool is_masked(const LowLatencyDomain& ll, int peer) {
    return ll.mask_after_ns != 0 && reinterpret_cast<const volatile uint32_t*>(ll.masked)[peer] != 0;
}

// Waits until *flag >= target, and notes for how long. Order: acquires what was released with the flag.
__device__ __forceinline__ Came wait_for_peer(const LowLatencyDomain& ll, LowLatencyKind kind,
                                              const uint64_t* flag, uint64_t target, Phase phase, int peer,
                                              LongestWaits& waits) {
    uint64_t seen = ptx::ld_acquire_sys(flag);
    if (seen >= target) return Came::kHere;
    const Domain& domain = ll.domain;
    const uint64_t start = ptx::globaltimer_ns();
    const uint64_t limit_ns = ll.mask_after_ns != 0 ? ll.mask_after_ns : domain.timeout_ns;
    uint64_t waited_ns = 0;
    bool told = false;
    Came came = Came::kHere;
    while ((seen = ptx::ld_acquire_sys(flag)) < target) {
        waited_ns = ptx::globaltimer_ns() - start;
        if (has_failed(domain)) {
            came = Came::kFailed;
            break;
        }
        if (is_masked(ll, peer)) {
            came = Came::kMasked;
            break;
        }
        if (waited_ns > limit_ns) {
            if (ll.mask_after_ns != 0) {
                atomicExch(&ll.masked[peer], 1u);
                came = Came::kMasked;
            } else {
                report(domain, DeviceError::kTimeout, operation_of(kind), phase, peer, target, seen);
                came = Came::kFailed;
            }
            break;
        }
        if (!told && waited_ns > domain.warn_ns) {
            told = true;
            tell_late(domain, operation_of(kind), phase, peer, target, seen);
        }
    }
    atomicMax(&waits.ns[peer], static_cast<unsigned long long>(waited_ns));
    return came;
}

// Waits until `peer` has consumed what this rank sent two operations of the kind ago, whose set `epoch` uses.
//
// Order: acquires the peer's reads of the set, which its finish_receive() released: this rank's stores come after them.
__device__ __forceinline__ Came await_room(const LowLatencyDomain& ll, LowLatencyKind kind, uint64_t epoch,
                                           int peer, LongestWaits& waits) {
    if (is_masked(ll, peer)) return Came::kMasked;
    dawdle(ll.domain, Site::kAwaitMark, peer, epoch);
    const uint64_t* mark =
        &own_low_latency_control(ll)->consumed[static_cast<int>(kind)][epoch % kNumSets][peer];
    const uint64_t target = epoch <= kNumSets ? 0 : epoch - kNumSets;
    return wait_for_peer(ll, kind, mark, target, Phase::kDone, peer, waits);
}

__device__ __forceinline__ LowLatencyHeader* header_at(const LowLatencyDomain& ll, LowLatencyKind kind,
                                                       int from, int to, uint64_t epoch) {
    return reinterpret_cast<LowLatencyHeader*>(
        ll.region[to] + ll.layout.header(kind, static_cast<int>(epoch % kNumSets), from));
}

// Sends the header to `to`, and with it what the block has written behind it. By one thread for each peer, after a block
// barrier that follows the block's last store.
//
// Order: releases those stores, which the barrier brought to this thread, and the fields (kFieldsBeforeFlag).
__device__ __forceinline__ void publish_header(const LowLatencyDomain& ll, LowLatencyKind kind, int to,
                                               uint64_t epoch, const LowLatencyHeader& fields) {
    LowLatencyHeader* header = header_at(ll, kind, ll.domain.rank, to, epoch);
    const bool broken = is_broken(ll.domain, Contract::kFieldsBeforeFlag);
    if (broken) ptx::st_relaxed_sys(&header->epoch, epoch);
    dawdle(ll.domain, Site::kFields, to, epoch);
    header->signature = fields.signature;
    header->num_tokens = fields.num_tokens;
    header->num_pieces = fields.num_pieces;
    header->piece_bytes = fields.piece_bytes;
    dawdle(ll.domain, Site::kPublish, to, epoch);
    ptx::fence_acq_rel_sys();
    if (!broken) ptx::st_relaxed_sys(&header->epoch, epoch);
}

// The first block that knows decides whether a rank takes part in an operation: all blocks must see the same ranks, or
// they would place rows differently. Returns what was decided.
__device__ __forceinline__ bool decide(const LowLatencyDomain& ll, LowLatencyKind kind, uint64_t epoch,
                                       int peer, bool is_here) {
    auto* word = reinterpret_cast<unsigned long long*>(
        &own_low_latency_control(ll)->verdict[static_cast<int>(kind)][epoch % kNumSets][peer]);
    const unsigned long long mine = epoch << 1 | (is_here ? 1u : 0u);
    unsigned long long seen = *reinterpret_cast<volatile unsigned long long*>(word);
    while (seen >> 1 < epoch) {
        const unsigned long long before = atomicCAS(word, seen, mine);
        if (before == seen) return is_here;
        seen = before;
    }
    return (seen & 1) != 0;
}

// Waits for the header of `from`. kMasked: it takes no part, in the eyes of all blocks of this rank. A header with another
// signature is a failure.
//
// Order: acquires the header and what its publish_header() released. Whoever else reads these comes after a barrier.
__device__ __forceinline__ Came await_header(const LowLatencyDomain& ll, LowLatencyKind kind, int from,
                                             uint64_t epoch, uint64_t signature, LongestWaits& waits) {
    const LowLatencyHeader* header = header_at(ll, kind, from, ll.domain.rank, epoch);
    dawdle(ll.domain, Site::kAwait, from, epoch);
    Came came = is_masked(ll, from)
                    ? Came::kMasked
                    : wait_for_peer(ll, kind, &header->epoch, epoch, Phase::kAnnouncement, from, waits);
    if (came == Came::kFailed) return came;
    if (ll.mask_after_ns != 0) {
        if (!decide(ll, kind, epoch, from, came == Came::kHere)) return Came::kMasked;
        // Decided by a block that saw it: it is here, and this only acquires it.
        while (ptx::ld_acquire_sys(&header->epoch) < epoch) {
        }
    }
    const uint64_t theirs = *reinterpret_cast<const volatile uint64_t*>(&header->signature);
    if (theirs == signature) return Came::kHere;
    if (theirs == kRefusedSignature && kind == LowLatencyKind::kDispatch) {
        // No failure of the buffer: that rank has no tokens in this operation, and its peers' hosts learn of it.
        ll.domain.host->refused_by = from + 1;
        return Came::kMasked;
    }
    const auto error = theirs == kRefusedSignature ? DeviceError::kRefused : DeviceError::kSignature;
    report(ll.domain, error, operation_of(kind), Phase::kAnnouncement, from, signature, theirs);
    return Came::kFailed;
}

// Sends a piece that the calling warp has stored at the ranks of `to` (bits). By all lanes; flag_at(rank) is where the
// piece's flag lies in that rank's region, in bytes.
//
// Order: the warp barrier brings the stores of all lanes to those that release them.
template <class FlagAt>
__device__ __forceinline__ void publish_piece(const LowLatencyDomain& ll, unsigned to, uint64_t epoch,
                                              const FlagAt& flag_at) {
    __syncwarp();
    const int peer = static_cast<int>(threadIdx.x % 32);
    if ((to >> peer & 1u) == 0) return;
    dawdle(ll.domain, Site::kPublish, peer, epoch);
    ptx::fence_acq_rel_sys();
    ptx::st_relaxed_sys(reinterpret_cast<uint64_t*>(ll.region[peer] + flag_at(peer)), epoch);
}

// The same for pieces of several rows that the warp has stored at one rank: bit i of `rows` has its flag at flag_at(i).
template <class FlagAt>
__device__ __forceinline__ void publish_pieces(const LowLatencyDomain& ll, int to, unsigned rows,
                                               uint64_t epoch, const FlagAt& flag_at) {
    __syncwarp();
    const int row = static_cast<int>(threadIdx.x % 32);
    if ((rows >> row & 1u) == 0) return;
    dawdle(ll.domain, Site::kPublish, to, epoch);
    ptx::fence_acq_rel_sys();
    ptx::st_relaxed_sys(reinterpret_cast<uint64_t*>(ll.region[to] + flag_at(row)), epoch);
}

// Waits for a piece of `from` whose flag lies `flag_at` bytes into the own region. By all lanes of a warp, so that each
// acquires the piece for its own loads; one load serves all. The same answer for all lanes.
__device__ __forceinline__ Came await_piece(const LowLatencyDomain& ll, LowLatencyKind kind, int from,
                                            int64_t flag_at, uint64_t epoch, LongestWaits& waits) {
    if (is_broken(ll.domain, Contract::kAwaitAnnouncement)) return Came::kHere;
    const auto* flag = reinterpret_cast<const uint64_t*>(ll.region[ll.domain.rank] + flag_at);
    dawdle(ll.domain, Site::kAwaitPushed, from, epoch);
    const Came came = wait_for_peer(ll, kind, flag, epoch, Phase::kPushed, from, waits);
    // A lane may see the flag just before another one gives up.
    return static_cast<Came>(__reduce_max_sync(0xFFFFFFFFu, static_cast<unsigned>(came)));
}

// Whether the calling block is the last one of its grid to have come to the end of a part (0: send, 1: receive). By all
// threads of a block; then everything that the grid's threads did before is ordered before what the caller does next.
__device__ __forceinline__ bool arrives_last(const LowLatencyDomain& ll, LowLatencyKind kind, int part) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t* arrived = &own_low_latency_control(ll)->arrived[static_cast<int>(kind)][part];
        is_last = ptx::add_acq_rel_gpu(arrived, 1) == gridDim.x - 1;
        if (is_last) *arrived = 0;
    }
    __syncthreads();
    return is_last;
}

// The end of a kernel that only sends.
__device__ __forceinline__ void finish_send(const LowLatencyDomain& ll, LowLatencyKind kind, uint64_t epoch) {
    dawdle(ll.domain, Site::kArrive, ll.domain.rank, epoch);
    if (arrives_last(ll, kind, 0) && threadIdx.x == 0) {
        own_low_latency_control(ll)->epoch[static_cast<int>(kind)] = epoch;
    }
}

// The end of a kernel that receives; `begins` says whether it also began the operation. By all threads of every block,
// after their last load from the own region. wait_stats: int64 [R] to add the waits to, or null.
//
// Order: the last block has acquired the loads of the whole grid, and its mark releases them to each sender
// (kMarkAfterStores), whose await_room() acquires it.
__device__ __forceinline__ void finish_receive(const LowLatencyDomain& ll, LowLatencyKind kind,
                                               uint64_t epoch, bool begins, const LongestWaits& waits,
                                               int64_t* wait_stats) {
    LowLatencyControl* own = own_low_latency_control(ll);
    const int peer = static_cast<int>(threadIdx.x), k = static_cast<int>(kind);
    auto* longest = reinterpret_cast<unsigned long long*>(own->waited_ns[k]);
    auto release_set = [&] {
        dawdle(ll.domain, Site::kMark, peer, epoch);
        ptx::fence_acq_rel_sys();
        ptx::st_relaxed_sys(&low_latency_control(ll, peer)->consumed[k][epoch % kNumSets][ll.domain.rank],
                            epoch);
    };
    __syncthreads();
    if (peer < ll.domain.num_ranks) {
        if (waits.ns[peer] != 0) atomicMax(&longest[peer], waits.ns[peer]);
        if (is_broken(ll.domain, Contract::kMarkAfterStores) && blockIdx.x == 0) release_set();
    }
    dawdle(ll.domain, Site::kArrive, ll.domain.rank, epoch);
    if (!arrives_last(ll, kind, 1)) return;
    if (peer < ll.domain.num_ranks) {
        const unsigned long long ns = atomicExch(&longest[peer], 0ull);
        ll.last_waits_ns[k * ll.domain.num_ranks + peer] = ns;
        if (wait_stats != nullptr) wait_stats[peer] += static_cast<int64_t>(ns);
        // After a failure peers must not write where a wait was given up.
        if (!has_failed(ll.domain)) release_set();
    }
    if (begins && threadIdx.x == 0) own->epoch[k] = epoch;
}

}  // namespace deep_ep::sync
