// Order between ranks in low-latency operations: what carries its own epoch, flags that are epochs, waits that end, and
// leave to use memory again. Beside sync/exchange.cuh, whose failures, delays and planted bugs it shares; what is waited for
// lies in the region.
//
//   what                        written by                    read by
//   a header                    publish_header()              await_header()
//   a tagged word               send_word()                   peek_word(), is_here()
//   a packet                    send_packet()                 peek_packet(), is_here()
//   a line                      ptx::st_line()                ptx::ld_line(), is_here() of its last 16 bytes
//   a line after rows           release_to_lines()            acquire_after_lines()
//   a piece of a row            publish_piece(), release      await_piece(), acquire
//   pieces of several rows      publish_pieces(), release     await_pieces(), acquire
//   leave to use a set again    note_received(), then         peek_rooms(), await_room()
//                               tell_consumed(), release
//
// A word, packet or line is one access that holds its epoch beside what it carries: who sees the epoch has the rest, so there is
// nothing to order and no fence to pay for.
//
// A rank sends at most two operations of a kind ahead of what a peer has consumed, and the sets alternate, so a set is
// free when the peer has consumed the epoch two before. What a kernel has received is told at the start of the rank's next
// low-latency kernel, whatever its kind, when the one before has ended anyway: a rank begins operation e + 1 of a kind only
// after that start in its own order of calls, which is that of all ranks, so nobody waits for a kernel that never comes.
//
// A kernel begins before those ahead of it in the stream have ended: it takes its epoch, looks for leave to write, and sends
// its headers, which say only what the host knows. So peers have them when they come to wait.
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

// What happens rarely is called, not inlined: these kernels run for a few microseconds, and fetching their code counts.
__device__ __noinline__ inline void dawdle_apart(const Domain& domain, Site site, int peer, uint64_t epoch) {
    dawdle(domain, site, peer, epoch);
}
__device__ __forceinline__ void may_dawdle(const Domain& domain, Site site, int peer, uint64_t epoch) {
    if (domain.delay_seed != 0) dawdle_apart(domain, site, peer, epoch);
}
__device__ __noinline__ inline void report_apart(const Domain& domain, DeviceError error, Operation operation,
                                                 Phase phase, int peer, uint64_t expected, uint64_t seen) {
    report(domain, error, operation, phase, peer, expected, seen);
}

__device__ __forceinline__ LowLatencyControl* low_latency_control(const LowLatencyDomain& ll, int rank) {
    return reinterpret_cast<LowLatencyControl*>(ll.region[rank]);
}

__device__ __forceinline__ LowLatencyControl* own_low_latency_control(const LowLatencyDomain& ll) {
    return low_latency_control(ll, ll.domain.rank);
}

__device__ __forceinline__ Operation operation_of(LowLatencyKind kind) {
    return kind == LowLatencyKind::kDispatch ? Operation::kLowLatencyDispatch : Operation::kLowLatencyCombine;
}

// Number of the operation that this kernel begins. By one thread of every block, once. May come before kernels ahead in the
// stream have ended: they have begun, since each lets the next one start after it has begun.
__device__ __forceinline__ uint64_t begin_operation(const LowLatencyDomain& ll, LowLatencyKind kind) {
    constexpr int kBlockBits = 16;
    auto* begun =
        reinterpret_cast<unsigned long long*>(&own_low_latency_control(ll)->begun[static_cast<int>(kind)]);
    // Together the blocks add one operation; whatever their order, none before the last one carries into its number.
    const unsigned long long rest = (1ull << kBlockBits) - (gridDim.x - 1);
    return (atomicAdd(begun, blockIdx.x == 0 ? rest : 1ull) >> kBlockBits) + 1;
}

__device__ __forceinline__ bool is_masked(const LowLatencyDomain& ll, int peer) {
    return ll.mask_after_ns != 0 && reinterpret_cast<const volatile uint32_t*>(ll.masked)[peer] != 0;
}

// How long a wait has lasted.
struct Patience {
    uint64_t start_ns;
    uint32_t num_tries;
    bool told;
};

// Asked again and again while what is awaited is not there: kHere to go on waiting.
__device__ __noinline__ inline Came keep_waiting(const LowLatencyDomain& ll, LowLatencyKind kind, Phase phase,
                                                 int peer, uint64_t target, uint64_t seen,
                                                 Patience& patience) {
    // What is looked at here lies in memory, so doing so at every try would halve the tries.
    constexpr uint32_t kTries = 8;
    if (++patience.num_tries % kTries != 0) return Came::kHere;
    const Domain& domain = ll.domain;
    if (has_failed(domain)) return Came::kFailed;
    if (is_masked(ll, peer)) return Came::kMasked;
    const uint64_t now = ptx::globaltimer_ns();
    if (patience.start_ns == 0) patience.start_ns = now;
    const uint64_t waited_ns = now - patience.start_ns;
    if (ll.mask_after_ns != 0 && waited_ns > ll.mask_after_ns) {
        atomicExch(&ll.masked[peer], 1u);
        return Came::kMasked;
    }
    if (ll.mask_after_ns == 0 && waited_ns > domain.timeout_ns) {
        report(domain, DeviceError::kTimeout, operation_of(kind), phase, peer, target, seen);
        return Came::kFailed;
    }
    if (!patience.told && waited_ns > domain.warn_ns) {
        patience.told = true;
        tell_late(domain, operation_of(kind), phase, peer, target, seen);
    }
    return Came::kHere;
}

// Waits until `try_once(seen)` is true; `seen` is what it saw in place of `target`.
template <class TryOnce>
__device__ __forceinline__ Came wait_for_peer(const LowLatencyDomain& ll, LowLatencyKind kind, Phase phase,
                                              int peer, uint64_t target, const TryOnce& try_once) {
    Patience patience{};
#pragma unroll 1
    for (uint64_t seen = 0; !try_once(seen);) {
        const Came came = keep_waiting(ll, kind, phase, peer, target, seen, patience);
        if (came != Came::kHere) return came;
    }
    return Came::kHere;
}

// The same for all lanes of a warp, with one answer: each lane waits for its own, `is_here` says for which it is there.
template <class TryOnce>
__device__ __forceinline__ Came wait_by_lanes(const LowLatencyDomain& ll, LowLatencyKind kind, Phase phase,
                                              int peer, uint64_t target, bool is_here,
                                              const TryOnce& try_once) {
    constexpr unsigned kAll = 0xFFFFFFFFu;
    Patience patience{};
#pragma unroll 1
    while (!__all_sync(kAll, is_here)) {
        Came came = Came::kHere;
        if (!is_here) is_here = try_once();
        if (!is_here) came = keep_waiting(ll, kind, phase, peer, target, 0, patience);
        came = static_cast<Came>(__reduce_max_sync(kAll, static_cast<unsigned>(came)));
        if (came != Came::kHere) return came;
    }
    return Came::kHere;
}

// The same where what one lane waits for tells of what others have loaded: all of them try again together.
template <class TryOnce>
__device__ __forceinline__ Came wait_by_warp(const LowLatencyDomain& ll, LowLatencyKind kind, Phase phase,
                                             int peer, uint64_t target, bool is_here,
                                             const TryOnce& try_once) {
    constexpr unsigned kAll = 0xFFFFFFFFu;
    Patience patience{};
#pragma unroll 1
    while (!__all_sync(kAll, is_here)) {
        is_here = try_once();
        Came came = Came::kHere;
        if (!is_here) came = keep_waiting(ll, kind, phase, peer, target, 0, patience);
        came = static_cast<Came>(__reduce_max_sync(kAll, static_cast<unsigned>(came)));
        if (came != Came::kHere) return came;
    }
    return Came::kHere;
}

// Tells each peer what this rank has received of all operations before, so that it may write there again. By one warp of a
// kernel, at its start; the kernels that received have ended. After a failure peers must not write where a wait was given up.
//
// Order: the marks come after the loads of those kernels (kMarkAfterStores), which have ended: no load is under way that a fence
// would have to wait for. Pairs with await_room().
__device__ __forceinline__ void tell_consumed(const LowLatencyDomain& ll, LowLatencyKind kind) {
    const int peer = static_cast<int>(threadIdx.x % 32);
    if (peer >= ll.domain.num_ranks) return;
    const LowLatencyControl* own = own_low_latency_control(ll);
    LowLatencyControl* theirs = low_latency_control(ll, peer);
    // Before it is known whether they count.
    uint64_t received[kNumKinds][kNumSets];
#pragma unroll
    for (int k = 0; k < kNumKinds; ++k) {
#pragma unroll
        for (int set = 0; set < kNumSets; ++set) received[k][set] = own->received[k][set];
    }
    if (has_failed(ll.domain)) return;
    may_dawdle(ll.domain, Site::kMark, peer,
               received[0][0] + received[0][1] + received[1][0] + received[1][1]);
    const bool is_early = is_broken(ll.domain, Contract::kMarkAfterStores);
#pragma unroll
    for (int k = 0; k < kNumKinds; ++k) {
#pragma unroll
        for (int set = 0; set < kNumSets; ++set) {
            // Planted: told of what is yet to be received.
            const uint64_t ahead = is_early && k == static_cast<int>(kind) ? kNumSets : 0;
            ptx::st_relaxed_sys(&theirs->consumed[k][set][ll.domain.rank], received[k][set] + ahead);
        }
    }
}

// By one thread of the block that told, at its end: the kernel receives this operation. After a failure too, but then nothing is
// told any more.
__device__ __forceinline__ void note_received(const LowLatencyDomain& ll, LowLatencyKind kind,
                                              uint64_t epoch) {
    own_low_latency_control(ll)->received[static_cast<int>(kind)][epoch % kNumSets] = epoch;
}

// What a peer has consumed, of both sets, so that the loads need not come after that of the epoch.
struct Room {
    uint64_t consumed[kNumSets];
};

__device__ __forceinline__ Room peek_room(const LowLatencyDomain& ll, LowLatencyKind kind, int peer) {
    const auto& consumed = own_low_latency_control(ll)->consumed[static_cast<int>(kind)];
    return {{ptx::ld_relaxed_sys(&consumed[0][peer]), ptx::ld_relaxed_sys(&consumed[1][peer])}};
}

// The epoch whose consumption frees the set of `epoch`.
__device__ __forceinline__ uint64_t freed_by(uint64_t epoch) {
    return epoch <= kNumSets ? 0 : epoch - kNumSets;
}

__device__ __forceinline__ bool has_room(const Room& peeked, uint64_t epoch) {
    static_assert(kNumSets == 2);
    return (epoch % 2 == 0 ? peeked.consumed[0] : peeked.consumed[1]) >= freed_by(epoch);
}

// Looks whether all peers have left room, by one warp and with one answer; room: of the lane's peer. early: a few times, while
// kernels ahead in the stream may still run, since marks only grow.
__device__ __forceinline__ bool peek_rooms(const LowLatencyDomain& ll, LowLatencyKind kind, uint64_t epoch,
                                           bool early, Room& room) {
    constexpr int kEarlyTries = 32;
    const int peer = static_cast<int>(threadIdx.x % 32);
    const bool is_peer = peer < ll.domain.num_ranks;
    bool has_all = false;
#pragma unroll 1
    for (int tries = early ? kEarlyTries : 1; tries > 0 && !has_all; --tries) {
        if (is_peer) room = peek_room(ll, kind, peer);
        has_all = __all_sync(0xFFFFFFFFu, !is_peer || has_room(room, epoch));
    }
    return has_all;
}

// Waits until `peer` has consumed what this rank sent two operations of the kind ago, whose set `epoch` uses.
//
// Order: this rank's stores to the set come after the peer's loads from it, which tell_consumed() released. They depend on
// a branch on what is loaded here, and no store is made before a branch it depends on.
__device__ __forceinline__ Came await_room(const LowLatencyDomain& ll, LowLatencyKind kind, uint64_t epoch,
                                           int peer, const Room& peeked) {
    if (is_masked(ll, peer)) return Came::kMasked;
    if (is_broken(ll.domain, Contract::kAwaitMarks)) return Came::kHere;
    may_dawdle(ll.domain, Site::kAwaitMark, peer, epoch);
    if (has_room(peeked, epoch)) return Came::kHere;
    const uint64_t target = freed_by(epoch);
    const uint64_t* mark =
        &own_low_latency_control(ll)->consumed[static_cast<int>(kind)][epoch % kNumSets][peer];
    return wait_for_peer(ll, kind, Phase::kDone, peer, target, [&](uint64_t& seen) {
        seen = ptx::ld_acquire_sys(mark);
        return seen >= target;
    });
}

// Tagged words and packets. The tag is the low half of the epoch.

__device__ __forceinline__ void send_word(uint8_t* at, uint64_t epoch, uint32_t value) {
    ptx::st_relaxed_sys(reinterpret_cast<uint64_t*>(at), epoch << 32 | value);
}

__device__ __forceinline__ uint64_t peek_word(const uint8_t* at) {
    return ptx::ld_relaxed_sys(reinterpret_cast<const uint64_t*>(at));
}

__device__ __forceinline__ bool is_here(uint64_t word, uint64_t epoch) {
    return static_cast<uint32_t>(word >> 32) == static_cast<uint32_t>(epoch);
}

// Three words to a peer, or to this rank itself.
__device__ __forceinline__ void send_packet(uint8_t* at, uint64_t epoch, uint32_t a, uint32_t b, uint32_t c) {
    ptx::st_relaxed_sys_b128(at, {a, b, c, static_cast<uint32_t>(epoch)});
}

__device__ __forceinline__ uint4 peek_packet(const uint8_t* at) {
    return ptx::ld_relaxed_sys_b128(at);
}

__device__ __forceinline__ bool is_here(const uint4& packet, uint64_t epoch) {
    return packet.w == static_cast<uint32_t>(epoch);
}

// Rows are not awaited: what a test plants.
__device__ __forceinline__ bool takes_unawaited(const Domain& domain) {
    return is_broken(domain, Contract::kAwaitAnnouncement);
}

// Sends the header to `to`. By one thread for each peer.
__device__ __forceinline__ void publish_header(const LowLatencyDomain& ll, LowLatencyKind kind, int to,
                                               uint64_t epoch, const LowLatencyHeader& header) {
    may_dawdle(ll.domain, Site::kPublish, to, epoch);
    const int64_t at = ll.layout.header(kind, static_cast<int>(epoch % kNumSets), ll.domain.rank);
    send_packet(ll.region[to] + at, epoch, header.signature, static_cast<uint32_t>(header.num_tokens),
                static_cast<uint32_t>(header.num_pieces | header.piece_steps << 8));
}

// The first block that knows decides whether a rank takes part in an operation: all blocks must see the same ranks, or
// they would place rows differently. Returns what was decided.
__device__ __forceinline__ bool decide(const LowLatencyDomain& ll, LowLatencyKind kind, uint64_t epoch,
                                       int peer, bool is_here) {
    if (ll.mask_after_ns == 0) return is_here;
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

__device__ __forceinline__ const uint8_t* own_header(const LowLatencyDomain& ll, LowLatencyKind kind,
                                                     int from, uint64_t epoch) {
    return ll.region[ll.domain.rank] + ll.layout.header(kind, static_cast<int>(epoch % kNumSets), from);
}

__device__ __forceinline__ LowLatencyHeader unpack_header(const uint4& packet) {
    return {packet.x, static_cast<int>(packet.y), static_cast<int>(packet.z & 0xFF),
            static_cast<int>(packet.z >> 8)};
}

// The header of a rank that takes part, as another block has seen.
__device__ __forceinline__ LowLatencyHeader read_header(const LowLatencyDomain& ll, LowLatencyKind kind,
                                                        int from, uint64_t epoch) {
    const uint64_t start = ptx::globaltimer_ns();
    uint4 packet = peek_packet(own_header(ll, kind, from, epoch));
    while (!is_here(packet, epoch) && !has_failed(ll.domain)) {
        packet = peek_packet(own_header(ll, kind, from, epoch));
        // Cannot be, as it was seen; but no wait is without an end.
        if (ptx::globaltimer_ns() - start > ll.domain.timeout_ns) {
            report_apart(ll.domain, DeviceError::kTimeout, operation_of(kind), Phase::kAnnouncement, from,
                         epoch, packet.w);
        }
    }
    return unpack_header(packet);
}

// Waits for the header of `from`. kMasked: it takes no part, as far as this block has seen; see decide(). A header with
// another signature is a failure. waited_ns: how long, if not null.
__device__ __forceinline__ Came await_header(const LowLatencyDomain& ll, LowLatencyKind kind, int from,
                                             uint64_t epoch, uint64_t signature, LowLatencyHeader& header,
                                             uint64_t* waited_ns) {
    const uint8_t* at = own_header(ll, kind, from, epoch);
    may_dawdle(ll.domain, Site::kAwait, from, epoch);
    if (is_masked(ll, from)) return Came::kMasked;
    uint4 packet = peek_packet(at);
    if (!is_here(packet, epoch)) {
        const uint64_t start = ptx::globaltimer_ns();
        const Came came = wait_for_peer(ll, kind, Phase::kAnnouncement, from, epoch, [&](uint64_t& seen) {
            packet = peek_packet(at);
            seen = packet.w;
            return is_here(packet, epoch);
        });
        if (waited_ns != nullptr) *waited_ns = ptx::globaltimer_ns() - start;
        if (came != Came::kHere) return came;
    }
    header = unpack_header(packet);
    const uint32_t wanted = signature_tag(signature);
    if (header.signature == wanted) return Came::kHere;
    if (header.signature == kRefusedTag && kind == LowLatencyKind::kDispatch) {
        // No failure of the buffer: that rank has no tokens in this operation, and its peers' hosts learn of it.
        ll.domain.host->refused_by = from + 1;
        return Came::kMasked;
    }
    const auto error = header.signature == kRefusedTag ? DeviceError::kRefused : DeviceError::kSignature;
    report_apart(ll.domain, error, operation_of(kind), Phase::kAnnouncement, from, wanted, header.signature);
    return Came::kFailed;
}

// Between rows that a warp has stored at `to` and lines that tell of them, and between those lines and loads of the rows. By
// all lanes of a warp.
//
// Order: the warp barrier brings what other lanes stored, or saw, to each lane's fence.
__device__ __forceinline__ void release_to_lines(const LowLatencyDomain& ll, int to, uint64_t epoch) {
    __syncwarp();
    may_dawdle(ll.domain, Site::kPublish, to, epoch);
    ptx::fence_acq_rel_sys();
}
__device__ __forceinline__ void acquire_after_lines() {
    __syncwarp();
    ptx::fence_acq_rel_sys();
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
    may_dawdle(ll.domain, Site::kPublish, peer, epoch);
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
    may_dawdle(ll.domain, Site::kPublish, to, epoch);
    ptx::fence_acq_rel_sys();
    ptx::st_relaxed_sys(reinterpret_cast<uint64_t*>(ll.region[to] + flag_at(row)), epoch);
}

// Waits for a piece of `from` whose flag lies `flag_at` bytes into the own region. By all lanes of a warp, so that each
// acquires the piece for its own loads; one load serves all. The same answer for all lanes.
__device__ __forceinline__ Came await_piece(const LowLatencyDomain& ll, LowLatencyKind kind, int from,
                                            int64_t flag_at, uint64_t epoch) {
    if (takes_unawaited(ll.domain)) return Came::kHere;
    const auto* flag = reinterpret_cast<const uint64_t*>(ll.region[ll.domain.rank] + flag_at);
    may_dawdle(ll.domain, Site::kAwaitPushed, from, epoch);
    const auto try_once = [&] { return ptx::ld_acquire_sys(flag) >= epoch; };
    return wait_by_lanes(ll, kind, Phase::kPushed, from, epoch, try_once(), try_once);
}

// The same for pieces that several lanes wait for, each for one of its own. came: for the lane, kHere where it waits for
// nothing. False after a failure, for all lanes.
//
// Order: a lane's load acquires its piece, and the warp barrier brings that to the others, who load the piece too.
__device__ __forceinline__ bool await_pieces(const LowLatencyDomain& ll, LowLatencyKind kind, bool waits,
                                             int from, int64_t flag_at, uint64_t epoch, Came& came) {
    constexpr unsigned kAll = 0xFFFFFFFFu;
    const auto* flag = reinterpret_cast<const uint64_t*>(ll.region[ll.domain.rank] + flag_at);
    came = Came::kHere;
    if (takes_unawaited(ll.domain)) return true;
    if (waits) may_dawdle(ll.domain, Site::kAwaitPushed, from, epoch);
#pragma unroll 1
    while (true) {
        // All that are left in one round, as each load takes long; then for the first of those that are not there.
        if (waits) waits = ptx::ld_acquire_sys(flag) < epoch;
        const unsigned left = __ballot_sync(kAll, waits);
        if (left == 0) break;
        const int which = __ffs(left) - 1;
        const Came its = await_piece(ll, kind, __shfl_sync(kAll, from, which),
                                     __shfl_sync(kAll, static_cast<long long>(flag_at), which), epoch);
        if (its == Came::kFailed) return false;
        if (its == Came::kMasked && static_cast<int>(threadIdx.x % 32) == which) {
            came = its;
            waits = false;
        }
    }
    __syncwarp();
    return true;
}

// Keeps how long each peer was waited for, one thread a peer. wait_stats: int64 [R] to add it to, or null.
__device__ __forceinline__ void keep_wait(const LowLatencyDomain& ll, LowLatencyKind kind, int peer,
                                          uint64_t waited_ns, int64_t* wait_stats) {
    ll.last_waits_ns[static_cast<int>(kind) * ll.domain.num_ranks + peer] = waited_ns;
    if (wait_stats != nullptr) wait_stats[peer] += static_cast<int64_t>(waited_ns);
}

}  // namespace deep_ep::sync
