// What ranks tell each other through peer memory: the block at offset 0 of every rank's symmetric heap.
//
// Shared by host and device, so that sizes cannot disagree. Operations of a buffer are numbered by epochs from 1 on; all
// ranks run the same operations in the same order, so their epochs agree.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deep_ep {

constexpr int kMaxPeers = 32;           // ranks of one NVLink domain
constexpr int kMaxLocalExperts = 1024;  // experts of one rank whose counts can travel
constexpr int kMaxChannels = 128;       // channels of the handle matrices

enum class Operation : uint32_t {
    kDispatch = 1,  // layout included
    kCombine = 2,
    kLowLatencyDispatch = 3,
    kLowLatencyCombine = 4,
};

// From one rank to one other at the start of an operation. Offsets are into the sender's heap, -1 for an absent tensor.
struct alignas(16) Announcement {
    uint64_t epoch;      // written last, with release order
    uint64_t signature;  // of what must be equal on all ranks
    int64_t rows;        // dispatch: where rows for the sender go; combine: where the sender's rows lie
    int64_t scales;
    int64_t topk_idx;
    int64_t topk_weights;
    int64_t src_idx;
    int64_t capacity;                         // rows that the sender can take
    int32_t send_counts[kMaxPeers];           // rows from the sender to every rank
    int32_t channel_start[kMaxChannels];      // rows to the receiver before each channel
    int32_t expert_counts[kMaxLocalExperts];  // rows for each expert of the receiver
};

struct alignas(16) ControlBlock {
    // Written by the owner's kernels.
    uint64_t epoch;    // operations completed
    uint32_t arrived;  // blocks of the running kernel that have done their part
    uint32_t failed;   // set with the first failure: nothing is signalled or waited for any more
    // Written by peers; two of each, because a peer can be one operation ahead.
    alignas(16) Announcement announcements[2][kMaxPeers];
    uint64_t done[kMaxPeers];  // epoch up to which that rank has finished with this rank's memory
    // Combines whose rows copy engines bring, numbered by the hosts (see CombineRowsArgs).
    uint64_t inbox_open[kMaxPeers];  // number of the combine for which that rank takes rows into its inbox
    uint64_t pushed[kMaxPeers];      // number << 32 | end of the rows that have come from that rank
    // Written by the owner's kernels.
    uint64_t late[kMaxPeers];  // the last wait for each peer that the host was told of, see sync/exchange.cuh
    // From dispatch_notify to dispatch_rows, which runs beside it; 0 outside of a dispatch that routes anew.
    uint64_t routing;  // epoch of the dispatch whose counts are being exchanged
    uint64_t routed;   // the same when the rows' places are known
};

constexpr uint64_t kRefusedSignature =
    ~uint64_t{0};  // in place of a signature: the sender gave the operation up
// In place of a number, above any: copies no longer wait for an inbox. (They compare by a signed difference.)
constexpr uint64_t kInboxReleased = uint64_t{1} << 62;

constexpr int kMaxLayoutExperts = 4096;

// A wait that lasts long; the wait goes on.
struct LateWait {
    volatile uint64_t key;  // of (epoch, phase); written last
    volatile uint32_t operation;
    volatile uint32_t phase;
    volatile uint64_t expected;
    volatile uint64_t seen;
};

// In host memory that kernels write: the counts that the host waits for, and the first failure.
struct HostRecord {
    // Counts of an uncached dispatch; `epoch` is written last.
    volatile uint64_t epoch;
    volatile int64_t num_recv;
    volatile int64_t fits;  // 0: some rank's capacity is too small for what it would receive
    volatile int32_t send_counts[kMaxPeers * kMaxPeers];  // rows from each rank (row) to each
    volatile int32_t expert_counts[kMaxLocalExperts];
    // A worst-case dispatch that did not fit; `overflow_total` is written last, and set to 0 by the host.
    volatile int32_t overflow_rank;
    volatile int64_t overflow_capacity;
    volatile int64_t overflow_total;
    volatile int32_t refused_by;  // 1 + a rank that gave an operation up; set to 0 by the host
    // First failure; `error` is written last. See sync/exchange.cuh.
    volatile uint32_t error;
    volatile uint32_t operation;
    volatile uint32_t phase;
    volatile int32_t peer;
    volatile uint64_t expected;
    volatile uint64_t seen;
    LateWait late[kMaxPeers];  // by awaited peer
};

// A rank's view of its domain. `base[r]` is where rank r's heap is mapped here.
struct Domain {
    uint8_t* base[kMaxPeers];
    int num_ranks;
    int rank;
    HostRecord* host;  // as the device addresses it
    int num_sms;       // of this rank's GPU
    int fills_link;    // blocks of bulk copies that fill the GPU's links
    uint64_t timeout_ns;
    uint64_t warn_ns;     // a wait that lasts longer is told to the host, once
    uint32_t delay_seed;  // not 0: seeded delays at every signal and wait
    uint32_t planted;     // bits of broken contracts, see sync/planted.h
};

enum class DeviceError : uint32_t {
    kNone = 0,
    kTimeout = 1,
    kSignature = 2,
    kOverflow = 3,
    kExpertRange = 4,
    kRefused = 5
};
enum class Phase : uint32_t {
    kAnnouncement = 1,
    kDone = 2,
    kLayout = 3,
    kBulkCopy = 4,
    kPushed = 5,
    kRouted = 6
};

}  // namespace deep_ep
