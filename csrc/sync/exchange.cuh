// The only place where memory order between ranks is decided: announcements at the start of an operation, and the
// handshake at its end. Every wait has a deadline; a wait that misses it leaves a record for the host and gives up.
#pragma once

#include <cstdint>

#include "layout/control_block.h"
#include "ptx/memory.cuh"

namespace deep_ep::sync {

__device__ __forceinline__ ControlBlock* control(const Domain& domain, int rank) {
    return reinterpret_cast<ControlBlock*>(domain.base[rank]);
}

__device__ __forceinline__ ControlBlock* own_control(const Domain& domain) {
    return control(domain, domain.rank);
}

// Leaves the first failure to the host; later ones, mostly consequences, are dropped.
__device__ __forceinline__ void report(const Domain& domain, DeviceError error, Operation operation,
                                       Phase phase, int peer, uint64_t expected, uint64_t seen) {
    HostRecord* record = domain.host;
    if (atomicExch(&own_control(domain)->failed, 1u) != 0) return;
    record->operation = static_cast<uint32_t>(operation);
    record->phase = static_cast<uint32_t>(phase);
    record->peer = peer;
    record->expected = expected;
    record->seen = seen;
    ptx::fence_acq_rel_sys();
    record->error = static_cast<uint32_t>(error);
}

// Waits until *flag >= target. Order: acquires what the peer released with the flag.
__device__ __forceinline__ bool wait_at_least(const Domain& domain, const uint64_t* flag, uint64_t target,
                                              Operation operation, Phase phase, int peer) {
    uint64_t seen = ptx::ld_acquire_sys(flag);
    if (seen >= target) return true;
    const uint64_t start = ptx::globaltimer_ns();
    const auto* failed = reinterpret_cast<const volatile uint32_t*>(&own_control(domain)->failed);
    while ((seen = ptx::ld_acquire_sys(flag)) < target) {
        // One failure ends all waits: what was queued behind it must not wait for a deadline of its own.
        if (*failed != 0) return false;
        if (ptx::globaltimer_ns() - start > domain.timeout_ns) {
            report(domain, DeviceError::kTimeout, operation, phase, peer, target, seen);
            return false;
        }
    }
    return true;
}

// The announcement that `from` writes to `to` for `epoch`. Two exist, by parity: a rank can begin operation e + 1 only
// after this rank has finished its part of e, and e + 2 only after this rank has begun e + 1, so the slot of e is free.
__device__ __forceinline__ Announcement* announcement(const Domain& domain, int from, int to,
                                                      uint64_t epoch) {
    return &control(domain, to)->announcements[epoch & 1][from];
}

// Publishes an announcement whose other fields this thread block has written before a barrier. Order: releases those
// fields, and everything earlier in this stream that wrote the announced memory.
__device__ __forceinline__ void publish(Announcement* message, uint64_t epoch) {
    ptx::fence_acq_rel_sys();
    ptx::st_release_sys(&message->epoch, epoch);
}

// Waits for a peer's announcement and checks that it is in the same operation with the same shapes.
__device__ __forceinline__ bool await_announcement(const Domain& domain, int from, uint64_t epoch,
                                                   uint64_t signature, Operation operation) {
    const Announcement* message = announcement(domain, from, domain.rank, epoch);
    if (!wait_at_least(domain, &message->epoch, epoch, operation, Phase::kAnnouncement, from)) return false;
    const uint64_t theirs = *reinterpret_cast<const volatile uint64_t*>(&message->signature);
    if (theirs == signature) return true;
    report(domain, DeviceError::kSignature, operation, Phase::kAnnouncement, from, signature, theirs);
    return false;
}

// The end of an operation, called by all threads of every block after their last access to peers' memory.
//
// Order: each storing thread has completed its bulk stores; the block barrier and the arrival counter carry all stores
// of the grid to the last block, whose release publishes them to the peers. The last block then acquires the same from
// every peer, so what follows in this stream sees the peers' writes, and may reuse memory that peers have read. It
// waits for peers only, never for blocks of its own grid.
__device__ __forceinline__ void finish(const Domain& domain, uint64_t epoch, Operation operation) {
    __shared__ bool is_last;
    ControlBlock* own = own_control(domain);
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::fence_acq_rel_sys();
        is_last = ptx::add_acq_rel_gpu(&own->arrived, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    const int peer = static_cast<int>(threadIdx.x);
    // After a failure peers must not take this rank's part for done.
    if (peer < domain.num_ranks && atomicAdd(&own->failed, 0u) == 0) {
        ptx::fence_acq_rel_sys();
        ptx::st_release_sys(&control(domain, peer)->done[domain.rank], epoch);
        wait_at_least(domain, &own->done[peer], epoch, operation, Phase::kDone, peer);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        own->arrived = 0;
        own->epoch = epoch;
    }
}

}  // namespace deep_ep::sync
