// The only place where memory order between ranks is decided: announcements at the start of an operation, and the
// handshake at its end. Every wait has a deadline; a wait that misses it leaves a record for the host and gives up.
//
// The contracts have numbers (sync/planted.h), under which tests can break them one by one:
//
//   kFieldsBeforeFlag, kAnnouncedInTime   release: publish()                 acquire: await_announcement()
//   kAwaitAnnouncement                    await_announcement()
//   kMarkAfterStores                      release: finish(), its first half  acquire: finish(), its second half
//   kAwaitMarks                           finish(), its second half
//   kPlacesBeforeFlag                     release: tell_routed()             acquire: await_routed()
//   kAwaitPlaces                          await_routed()
//
// Time is part of a test too: a delay seed makes blocks dawdle at every signal and wait. With neither a seed nor a
// planted bug, a site costs one branch on a kernel argument.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout/control_block.h"
#include "ptx/bulk_copy.cuh"
#include "ptx/memory.cuh"
#include "sync/planted.h"

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

__device__ __forceinline__ bool has_failed(const Domain& domain) {
    return *reinterpret_cast<const volatile uint32_t*>(&own_control(domain)->failed) != 0;
}

// Tells the host of a wait that lasts long. Many threads may wait for the same: the first one tells.
__device__ __forceinline__ void tell_late(const Domain& domain, Operation operation, Phase phase, int peer,
                                          uint64_t expected, uint64_t seen) {
    const uint64_t key = (own_control(domain)->epoch + 1) << 3 | static_cast<uint32_t>(phase);
    auto* last = reinterpret_cast<unsigned long long*>(&own_control(domain)->late[peer]);
    if (atomicExch(last, key) == key) return;
    LateWait* late = &domain.host->late[peer];
    late->operation = static_cast<uint32_t>(operation);
    late->phase = static_cast<uint32_t>(phase);
    late->expected = expected;
    late->seen = seen;
    ptx::fence_acq_rel_sys();
    late->key = key;
}

// Places that can be delayed. They differ from contracts: a mark has a place before and one after its grid barrier.
enum class Site : uint32_t {
    kFields = 1,
    kPublish = 2,
    kAwait = 3,
    kOpenInbox = 4,
    kAwaitPushed = 5,
    kArrive = 6,
    kMark = 7,
    kAwaitMark = 8,
    kPlaces = 9,
    kAwaitPlaces = 10
};

__device__ __forceinline__ uint32_t mixed(uint32_t hash, uint32_t part) {
    hash = (hash ^ part) * 0x9E3779B1u;
    return hash ^ hash >> 15;
}

// With a delay seed: in a quarter of the operations a rank is slow at a site, and there its blocks wait up to 50 us, each
// for a time of its own. If all were slow always, ranks would wait for each other's delays, and no order would change.
__device__ __forceinline__ void dawdle(const Domain& domain, Site site, int peer, uint64_t epoch) {
    if (domain.delay_seed == 0) return;
    uint32_t hash =
        mixed(domain.delay_seed, static_cast<uint32_t>(domain.rank) << 8 | static_cast<uint32_t>(site));
    hash = mixed(hash, static_cast<uint32_t>(epoch));
    if ((hash >> 8 & 3) != 0) return;
    hash = mixed(mixed(hash, blockIdx.x), static_cast<uint32_t>(peer));
    const uint64_t start = ptx::globaltimer_ns(), delay_ns = (hash >> 8) % 50000;
    while (ptx::globaltimer_ns() - start < delay_ns) {
    }
}

// Whether a test has planted the bug that breaks this contract.
__device__ __forceinline__ bool is_broken(const Domain& domain, Contract contract) {
    return (domain.planted >> static_cast<uint32_t>(contract) & 1u) != 0;
}

// Waits until *flag >= target. Order: acquires what the peer released with the flag.
__device__ __forceinline__ bool wait_at_least(const Domain& domain, const uint64_t* flag, uint64_t target,
                                              Operation operation, Phase phase, int peer) {
    uint64_t seen = ptx::ld_acquire_sys(flag);
    if (seen >= target) return true;
    const uint64_t start = ptx::globaltimer_ns();
    bool told = false;
    const auto* failed = reinterpret_cast<const volatile uint32_t*>(&own_control(domain)->failed);
    while ((seen = ptx::ld_acquire_sys(flag)) < target) {
        // One failure ends all waits: what was queued behind it must not wait for a deadline of its own.
        if (*failed != 0) return false;
        const uint64_t waited_ns = ptx::globaltimer_ns() - start;
        if (waited_ns > domain.timeout_ns) {
            report(domain, DeviceError::kTimeout, operation, phase, peer, target, seen);
            return false;
        }
        if (!told && waited_ns > domain.warn_ns) {
            told = true;
            tell_late(domain, operation, phase, peer, target, seen);
        }
    }
    return true;
}

// Waits until the bulk loads that `barrier` counts have arrived from `peer`'s memory; true at once in the common case.
// False past the deadline: the bytes are not there, and may still come, so the stage must not be used again.
//
// Order: what the copies wrote to shared memory is visible to the threads that waited.
__device__ __forceinline__ bool await_bulk(const Domain& domain, uint64_t* barrier, uint32_t parity,
                                           Operation operation, int peer) {
    if (ptx::mbarrier_try_wait(barrier, parity)) return true;
    const uint64_t start = ptx::globaltimer_ns();
    // One try may itself wait for a while in hardware.
    for (uint32_t tries = 1; !ptx::mbarrier_try_wait(barrier, parity); ++tries) {
        if (tries % 64 != 0 || ptx::globaltimer_ns() - start <= domain.timeout_ns) continue;
        const uint64_t done = own_control(domain)->epoch;
        report(domain, DeviceError::kTimeout, operation, Phase::kBulkCopy, peer, done + 1, done);
        return false;
    }
    return true;
}

// The announcement that `from` writes to `to` for `epoch`. Two exist, by parity: a rank can begin operation e + 1 only
// after this rank has finished its part of e, and e + 2 only after this rank has begun e + 1, so the slot of e is free.
__device__ __forceinline__ Announcement* announcement(const Domain& domain, int from, int to,
                                                      uint64_t epoch) {
    return &control(domain, to)->announcements[epoch & 1][from];
}

// Where this rank writes the fields of its announcement to `to`; publish() sends it.
__device__ __forceinline__ Announcement* open_announcement(const Domain& domain, int to, uint64_t epoch) {
    Announcement* message = announcement(domain, domain.rank, to, epoch);
    if (is_broken(domain, Contract::kFieldsBeforeFlag)) {
        // What a store without release allows: the flag arrives first.
        ptx::st_release_sys(&message->epoch, epoch);
        dawdle(domain, Site::kFields, to, epoch);
    }
    return message;
}

// Publishes the announcement to `to` whose fields the calling thread, or its warp before a __syncwarp, has written.
//
// Order: releases those fields (kFieldsBeforeFlag) and everything earlier in this stream that wrote or read the memory
// announced: from here on the peer may write it (dispatch) or read it (combine). So it must not be sent before the
// stream has come to this operation (kAnnouncedInTime). The acquire is in await_announcement().
__device__ __forceinline__ void publish(const Domain& domain, int to, uint64_t epoch) {
    Announcement* message = announcement(domain, domain.rank, to, epoch);
    dawdle(domain, Site::kPublish, to, epoch);
    ptx::st_release_sys(&message->epoch, epoch);
    if (!is_broken(domain, Contract::kAnnouncedInTime)) return;
    // The slot of the next epoch is free, see announcement(); the counts in it stay those of the last operation.
    Announcement* early = announcement(domain, domain.rank, to, epoch + 1);
    const auto* from = reinterpret_cast<const volatile uint64_t*>(message);
    auto* into = reinterpret_cast<volatile uint64_t*>(early);
    for (size_t i = 1; i < offsetof(Announcement, send_counts) / sizeof(uint64_t); ++i) into[i] = from[i];
    ptx::st_release_sys(&early->epoch, epoch + 1);
}

// Waits for a peer's announcement. Each block that touches peers' memory waits by itself (kAwaitAnnouncement).
//
// Order: acquires the fields and what the peer's stream did to the memory announced before; pairs with publish(). Bulk
// copies see memory through another proxy: a block that reads the peer's rows by them fences proxies after this.
__device__ __forceinline__ bool await_announcement(const Domain& domain, int from, uint64_t epoch,
                                                   Operation operation) {
    const Announcement* message = announcement(domain, from, domain.rank, epoch);
    dawdle(domain, Site::kAwait, from, epoch);
    // Unawaited, it is the one of two operations ago, whose memory is the peer's as well: wrong, but not wild.
    return is_broken(domain, Contract::kAwaitAnnouncement) ||
           wait_at_least(domain, &message->epoch, epoch, operation, Phase::kAnnouncement, from);
}

// What a peer announced, but for its counts. To be read together: one after the other each field would cost a latency.
struct Terms {
    uint64_t signature;
    int64_t rows, scales, topk_idx, topk_weights, src_idx, capacity;
};
__device__ __forceinline__ Terms terms(const Domain& domain, int from, uint64_t epoch) {
    const Announcement* theirs = announcement(domain, from, domain.rank, epoch);
    return {theirs->signature,    theirs->rows,    theirs->scales,  theirs->topk_idx,
            theirs->topk_weights, theirs->src_idx, theirs->capacity};
}

// Whether a peer whose announcement is here is in the same operation with the same shapes.
__device__ __forceinline__ bool agrees(const Domain& domain, int from, uint64_t signature, uint64_t theirs,
                                       Operation operation) {
    if (theirs == signature) return true;
    if (theirs == kRefusedSignature && operation == Operation::kDispatch) {
        // No failure of the buffer: all ranks end the operation without moving anything.
        domain.host->refused_by = from + 1;
        return false;
    }
    // A combine may have rows under way that nobody will take, so there it is one.
    const auto error = theirs == kRefusedSignature ? DeviceError::kRefused : DeviceError::kSignature;
    report(domain, error, operation, Phase::kAnnouncement, from, signature, theirs);
    return false;
}

// dispatch_notify has begun: dispatch_rows, which runs beside it, learns the epoch.
//
// Order: releases what the kernels before this one in the stream wrote, which the calling thread has waited for. Pairs with
// await_routing().
__device__ __forceinline__ void tell_routing(const Domain& domain, uint64_t epoch) {
    ptx::st_release_gpu(&own_control(domain)->routing, epoch);
}

// The epoch of the dispatch whose counts are being exchanged; 0 after a failure. By a kernel that was launched while
// dispatch_notify runs. It has no deadline, like any wait of a stream for the kernels before: none of them waits for a peer
// without one.
//
// Order: acquires what tell_routing() releases. Nothing older is taken for it: finish() clears the word, and no kernel behind
// an operation starts before its blocks have ended.
__device__ __forceinline__ uint64_t await_routing(const Domain& domain) {
    const uint64_t* word = &own_control(domain)->routing;
    uint64_t epoch = 0;
    while ((epoch = ptx::ld_acquire_gpu(word)) == 0 && !has_failed(domain)) {
    }
    return epoch;
}

// The places of all rows are written; by one thread, after a block barrier that follows the block's writes.
//
// Order: releases them (kPlacesBeforeFlag). Pairs with await_routed().
__device__ __forceinline__ void tell_routed(const Domain& domain, uint64_t epoch) {
    dawdle(domain, Site::kPlaces, domain.rank, epoch);
    ptx::st_release_gpu(&own_control(domain)->routed, epoch);
}

// Waits for the places of all rows (kAwaitPlaces). The wait for the announcements, in dispatch_notify, has a deadline and tells
// in any case, so this one needs more time only where that kernel does not run.
//
// Order: acquires the places; pairs with tell_routed().
__device__ __forceinline__ bool await_routed(const Domain& domain, uint64_t epoch) {
    dawdle(domain, Site::kAwaitPlaces, domain.rank, epoch);
    // Unawaited, rows go where the memory of the handle says: to some row of the output, or nowhere.
    if (is_broken(domain, Contract::kAwaitPlaces)) return true;
    const uint64_t* word = &own_control(domain)->routed;
    const uint64_t start = ptx::globaltimer_ns();
    for (uint64_t seen = 0; (seen = ptx::ld_acquire_gpu(word)) != epoch;) {
        if (has_failed(domain)) return false;
        if (ptx::globaltimer_ns() - start <= 2 * domain.timeout_ns) continue;
        report(domain, DeviceError::kTimeout, Operation::kDispatch, Phase::kRouted, domain.rank, epoch, seen);
        return false;
    }
    return true;
}

// This rank's inbox is free for the rows of combine `number`, which `to`'s copy engine may bring from now on. Told to this rank
// itself, it says that its own rows are there, which its copy engine may take to the peers.
//
// Order: releases everything earlier in this stream that read or wrote the inbox, or wrote the rows. Pairs with a wait of `to`'s
// copy stream.
__device__ __forceinline__ void open_inbox(const Domain& domain, int to, uint64_t number) {
    dawdle(domain, Site::kOpenInbox, to, number);
    ptx::st_release_sys(&control(domain, to)->inbox_open[domain.rank], number);
}

// Waits until `from`'s copy engine has brought the rows up to `wanted` (number of the combine << 32 | end of the rows);
// returns how far it has come, less than that after a failure.
//
// Order: acquires the rows, which the copy stream of `from` wrote before the mark, and lets bulk copies of this thread see
// them.
__device__ __forceinline__ uint64_t await_pushed(const Domain& domain, int from, uint64_t wanted) {
    const uint64_t* mark = &own_control(domain)->pushed[from];
    dawdle(domain, Site::kAwaitPushed, from, wanted);
    wait_at_least(domain, mark, wanted, Operation::kCombine, Phase::kPushed, from);
    const uint64_t seen = ptx::ld_acquire_sys(mark);
    ptx::fence_proxy_async();
    return seen;
}

// The end of an operation, called by all threads of every block after their last access to peers' memory. Each thread
// that issued bulk stores has waited for all of them to complete (bulk_wait_all; that they were read is not enough).
//
// Order: the block barrier and the arrival counter carry all stores and loads of the grid to the last block, whose mark
// releases them to each peer (kMarkAfterStores). The last block then acquires the same from every peer (kAwaitMarks):
// what follows in this stream sees the peers' writes, and may reuse memory that peers have read. It waits for peers
// only, never for blocks of its own grid.
__device__ __forceinline__ void finish(const Domain& domain, uint64_t epoch, Operation operation) {
    __shared__ bool is_last, sends_marks;
    ControlBlock* own = own_control(domain);
    dawdle(domain, Site::kArrive, domain.rank, epoch);
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t arrived = ptx::add_acq_rel_gpu(&own->arrived, 1);
        is_last = arrived == gridDim.x - 1;
        sends_marks = is_broken(domain, Contract::kMarkAfterStores) ? arrived == 0 : is_last;
        if (is_last) own->routing = own->routed = 0;
    }
    __syncthreads();
    const int peer = static_cast<int>(threadIdx.x);
    // After a failure peers must not take this rank's part for done.
    if (sends_marks && peer < domain.num_ranks && atomicAdd(&own->failed, 0u) == 0) {
        dawdle(domain, Site::kMark, peer, epoch);
        ptx::st_release_sys(&control(domain, peer)->done[domain.rank], epoch);
        dawdle(domain, Site::kAwaitMark, peer, epoch);
        if (!is_broken(domain, Contract::kAwaitMarks)) {
            wait_at_least(domain, &own->done[peer], epoch, operation, Phase::kDone, peer);
        }
    }
    if (!is_last) return;
    __syncthreads();
    if (threadIdx.x == 0) {
        own->arrived = 0;
        own->epoch = epoch;
        // Nobody may come to open an inbox after a failure, and a copy that waits without end would hold up whoever
        // synchronises the device. PushCopies::release() does the same for what is enqueued later.
        for (int home = 0; has_failed(domain) && home < domain.num_ranks; ++home) {
            ptx::st_release_sys(&own->inbox_open[home], kInboxReleased);
        }
    }
}

}  // namespace deep_ep::sync
