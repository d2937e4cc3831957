#include <algorithm>

#include "kernels/low_latency_launch.h"
#include "kernels/low_latency_rows.cuh"
#include "layout/expert_range.h"
#include "ptx/grid.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"
#include "sync/low_latency.cuh"

namespace deep_ep {
namespace {

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
    bool packets;      // rows travel as packets, a step each
    RowPieces pieces;  // else so
    int num_senders;   // blocks after the announcing one; the others begin with the own rows
    int chunk_words;   // of 32 tokens, which the announcing block counts at a time
    ExpertMap experts;
    SmallDivider by_topk, by_pieces, by_local;  // selections of a token, what a row is sent in, local experts
};

// What the threads of a block share.
struct BlockState {
    uint64_t epoch;
    unsigned room;     // ranks, as bits, whose set this operation may write
    unsigned absent;   // sources, as bits, that are known to take no part while counts are awaited
    unsigned present;  // sources that take part
    unsigned packets;  // sources whose rows are packets
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

// Learns the operation's number, and waits for leave to write. By the first warp of every block, before the block's first
// store; the others know after a block barrier.
__device__ __forceinline__ void begin_block(const LowLatencyDomain& ll, BlockState& block) {
    const int peer = static_cast<int>(threadIdx.x);
    const bool is_peer = peer < ll.domain.num_ranks;
    sync::Room room{};
    if (is_peer) room = sync::peek_room(ll, kKind, peer);
    uint64_t epoch = 0;
    if (peer == 0) epoch = sync::begin_operation(ll, kKind);
    epoch = __shfl_sync(kAllLanes, epoch, 0);
    const bool may = is_peer && sync::await_room(ll, kKind, epoch, peer, room) == sync::Came::kHere;
    const unsigned all = __ballot_sync(kAllLanes, may);
    if (peer == 0) {
        block.epoch = epoch;
        block.room = all;
    }
}

// The expert of a selection; -1 for none, and for one that does not exist.
template <class Index>
__device__ __forceinline__ int existing(const LowLatencyDispatchArgs& args, Index given) {
    return given >= 0 && given < args.num_experts ? static_cast<int>(given) : -1;
}

template <class Index>
__device__ __forceinline__ Index selection(const LowLatencyDispatchArgs& args, int64_t i) {
    return static_cast<const Index*>(args.topk_idx)[i];
}

// The tokens of a chunk by expert, as bits, so that numbers follow the token order and a token that names an expert twice
// counts once.
struct Chunk {
    int num_experts;
    uint32_t* before;  // [num_experts]: tokens of earlier chunks
    uint32_t* bits;    // [words, num_experts]

    __device__ __forceinline__ void add(int expert, int token) const {
        atomicOr(&bits[token / 32 * num_experts + expert], 1u << token % 32);
    }
    // Earlier tokens with the expert.
    __device__ __forceinline__ uint32_t ordinal(int expert, int token) const {
        uint32_t sum =
            before[expert] + __popc(bits[token / 32 * num_experts + expert] & ((1u << token % 32) - 1));
#pragma unroll 1
        for (int w = 0; w < token / 32; ++w) sum += __popc(bits[w * num_experts + expert]);
        return sum;
    }
    __device__ __forceinline__ uint32_t count(int expert, int num_words) const {
        uint32_t sum = before[expert];
#pragma unroll 1
        for (int w = 0; w < num_words; ++w) sum += __popc(bits[w * num_experts + expert]);
        return sum;
    }
};

// Tells each peer the entries of a chunk's selections; see pack_entry.
__device__ __forceinline__ void send_entry(const LowLatencyDispatchArgs& args, const ExpertMap& experts,
                                           const BlockState& block, const Chunk& chunk, int expert, int token,
                                           int64_t i) {
    const LowLatencyDomain& ll = args.ll;
    int owner = -1;
    int32_t entry = -1;
    if (expert >= 0) {
        owner = experts.owner(expert);
        const uint32_t ordinal = args.expert_major ? chunk.ordinal(expert, token) : 0;
        entry = pack_entry(expert - experts.first(owner), static_cast<int>(ordinal));
    }
    const int set = set_of(block.epoch);
    const int64_t at = ll.layout.dispatch_entries(set, ll.domain.rank) + i * 8;
    if (args.topk_weights != nullptr && owner >= 0 && (block.room >> owner & 1u) != 0) {
        sync::send_word(ll.region[owner] + ll.layout.dispatch_weights(set, ll.domain.rank) + i * 8,
                        block.epoch, __float_as_uint(args.topk_weights[i]));
    }
#pragma unroll 1
    for (unsigned left = block.room; left != 0; left &= left - 1) {
        const int peer = __ffs(left) - 1;
        sync::send_word(ll.region[peer] + at, block.epoch, static_cast<uint32_t>(peer == owner ? entry : -1));
    }
}

__device__ void send_counts(const LowLatencyDispatchArgs& args, const ExpertMap& experts,
                            const BlockState& block, const Chunk& chunk, int num_words) {
    const LowLatencyDomain& ll = args.ll;
    const int64_t counts_at = ll.layout.dispatch_counts(set_of(block.epoch), ll.domain.rank);
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < args.num_experts; e += kNumThreads) {
        const int owner = experts.owner(e);
        if ((block.room >> owner & 1u) == 0) continue;
        const int local = e - experts.first(owner);
        sync::send_word(ll.region[owner] + counts_at + static_cast<int64_t>(local) * 8, block.epoch,
                        chunk.count(e, num_words));
    }
}

// Of selections in registers.
template <class Index>
__device__ __forceinline__ Index kept_at(const Index (&kept)[kKept], int j) {
    static_assert(kKept == 2);
    return j == 0 ? kept[0] : kept[1];
}

// By one block: tells each peer how many tokens there are, the counts of its experts, and for each selection the number of
// the token among those for the same expert. Where rows lie by source nothing has to be counted.
template <class Index>
__device__ void announce(const LowLatencyDispatchArgs& args, const DispatchPlan& plan, BlockState& block,
                         uint32_t* scratch) {
    const LowLatencyDomain& ll = args.ll;
    const int num_experts = args.num_experts, num_topk = args.num_topk,
              thread = static_cast<int>(threadIdx.x);
    const Chunk chunk{num_experts, scratch, scratch + num_experts};
    const int num_counted = args.expert_major ? num_experts : 0;
    const int chunk_tokens = 32 * plan.chunk_words;
#pragma unroll 1
    for (int first = 0; first == 0 || first < args.num_tokens; first += chunk_tokens) {
        const int num_tokens = min(chunk_tokens, args.num_tokens - first), num_words = (num_tokens + 31) / 32;
        const int64_t base = static_cast<int64_t>(first) * num_topk;
        const int num_selections = num_tokens * num_topk;
        Index kept[kKept];
#pragma unroll
        for (int j = 0; j < kKept; ++j) {
            const int i = thread + j * kNumThreads;
            kept[j] = i < num_selections ? selection<Index>(args, base + i) : Index{-1};
        }
#pragma unroll 1
        for (int i = thread; i < num_words * num_counted; i += kNumThreads) chunk.bits[i] = 0;
        if (first == 0) {
#pragma unroll 1
            for (int e = thread; e < num_counted; e += kNumThreads) chunk.before[e] = 0;
            if (thread < 32) begin_block(ll, block);
        }
        __syncthreads();
        if (first == 0 && (thread < ll.domain.num_ranks && (block.room >> thread & 1u) != 0)) {
            sync::publish_header(ll, kKind, thread, block.epoch,
                                 {signature_tag(args.signature), args.num_tokens,
                                  plan.packets ? 0 : plan.pieces.count, plan.pieces.bytes / kStepBytes});
        }
        int bad = -1;
#pragma unroll 1
        for (int i = thread, j = 0; i < num_selections; i += kNumThreads, ++j) {
            const Index given = j < kKept ? kept_at(kept, j) : selection<Index>(args, base + i);
            const int expert = existing(args, given);
            if (expert >= 0 && args.expert_major) chunk.add(expert, plan.by_topk.quotient(i));
            if (expert < 0 && given != -1) bad = i;
        }
        if (bad >= 0) {
            sync::report_apart(ll.domain, DeviceError::kExpertRange, Operation::kDispatch, Phase::kLayout,
                               plan.by_topk.remainder(bad), first + plan.by_topk.quotient(bad),
                               static_cast<uint64_t>(selection<Index>(args, base + bad)));
        }
        __syncthreads();
        const bool is_last = first + chunk_tokens >= args.num_tokens;
        if (is_last && args.expert_major) send_counts(args, plan.experts, block, chunk, num_words);
#pragma unroll 1
        for (int i = thread, j = 0; i < num_selections; i += kNumThreads, ++j) {
            const Index given = j < kKept ? kept_at(kept, j) : selection<Index>(args, base + i);
            send_entry(args, plan.experts, block, chunk, existing(args, given), plan.by_topk.quotient(i),
                       base + i);
        }
        if (is_last) return;
        __syncthreads();
#pragma unroll 1
        for (int e = thread; e < num_counted; e += kNumThreads) chunk.before[e] = chunk.count(e, num_words);
        __syncthreads();
    }
}

// The warps of `num_blocks` blocks from `first_block` on share the pieces of the tokens. begins: the block has yet to begin,
// and does so when each warp has its first piece at hand.
template <bool kFp8, class Index>
__device__ void send_rows(const LowLatencyDispatchArgs& args, const DispatchPlan& plan, BlockState& block,
                          int first_block, int num_blocks, bool begins) {
    const LowLatencyDomain& ll = args.ll;
    const RowShape shape = RowShape::of(args.hidden, kFp8, args.format);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int num_pieces = plan.packets ? shape.num_steps : plan.pieces.count;
    const int piece_steps = plan.packets ? 1 : plan.pieces.bytes / kStepBytes;
    // In one launch the own tokens need not travel: the receiving half takes them from x.
    const unsigned not_own = plan.part == LowLatencyPart::kWhole ? ~(1u << ll.domain.rank) : ~0u;
    const bool travels = ll.domain.num_ranks > 1 || plan.part != LowLatencyPart::kWhole;
    const int index = static_cast<int>(blockIdx.x) - first_block;
    const int num_items = travels && index < num_blocks ? args.num_tokens * num_pieces : 0;
    int item = index + warp * num_blocks;
    int token = 0, piece = 0, step = 0, end = 0;
    unsigned to = 0;
    Index given{-1};
    SourceStep<kFp8> source;
    auto open = [&] {
        if (item >= num_items) return;
        token = plan.by_pieces.quotient(item);
        piece = item - token * num_pieces;
        step = piece * piece_steps;
        end = min(step + piece_steps, shape.num_steps);
        given = lane < args.num_topk
                    ? selection<Index>(args, static_cast<int64_t>(token) * args.num_topk + lane)
                    : Index{-1};
    };
    auto load = [&] {
        if (item >= num_items) return;
        source = load_source<kFp8>(args.x + static_cast<int64_t>(token) * args.hidden * 2, shape, step, lane);
    };
    // After load(), so that selections and rows are under way together.
    auto close = [&] {
        const int expert = existing(args, given);
        const unsigned owner = expert >= 0 ? 1u << plan.experts.owner(expert) : 0u;
        to = __reduce_or_sync(kAllLanes, owner) & not_own;
    };
    open();
    load();
    if (begins) {
        if (warp == 0) begin_block(ll, block);
        __syncthreads();
    }
    close();
    const uint64_t epoch = block.epoch;
    const unsigned room = block.room;
    const int set = set_of(epoch);
#pragma unroll 1
    while (item < num_items) {
        to &= room;
        const RowStep what = encode<kFp8>(source, shape, step, args.format, lane);
#pragma unroll 1
        for (unsigned left = to; left != 0; left &= left - 1) {
            uint8_t* region = ll.region[__ffs(left) - 1];
            if (plan.packets) {
                uint8_t* row = region + ll.layout.dispatch_packets(set, ll.domain.rank, token);
                send_step(what, row, step, epoch, lane);
            } else {
                uint8_t* slot = region + ll.layout.dispatch_slot(set, ll.domain.rank, token);
                auto* scales = reinterpret_cast<uint32_t*>(slot + shape.num_bytes);
                store_step(what, slot, scales, 1, shape, step, lane);
            }
        }
        const bool is_done = ++step >= end || to == 0;
        if (is_done) {
            if (!plan.packets && to != 0) {
                const int64_t flag_at = ll.layout.dispatch_flag(set, ll.domain.rank, token, piece);
                sync::publish_piece(ll, to, epoch, [&](int) { return flag_at; });
            }
            item += num_blocks * kNumWarps;
            open();
        }
        load();
        if (is_done) close();
    }
}

// The sources by turn, from the own rank on.
__device__ __forceinline__ int source_of(const Domain& domain, int turn) {
    const int source = domain.rank + turn;
    return source < domain.num_ranks ? source : source - domain.num_ranks;
}

// What a source's header says. Within bounds whatever it says, as after a bug that a test planted.
__device__ __forceinline__ void take_header(const LowLatencyDispatchArgs& args, const RowShape& shape,
                                            const LowLatencyHeader& header, int source, BlockState& block) {
    const bool packets = header.num_pieces == 0;
    const int most = packets ? min(args.ll.layout.packet_tokens, args.num_max_tokens) : args.num_max_tokens;
    block.num_tokens[source] = min(max(header.num_tokens, 0), most);
    block.num_pieces[source] = packets ? shape.num_steps : min(header.num_pieces, kMaxRowPieces);
    block.by_pieces[source] = SmallDivider::of(block.num_pieces[source]);
    block.piece_steps[source] = packets ? 1 : max(header.piece_steps, 1);
    if (packets) atomicOr(&block.packets, 1u << source);
}

// Waits for the headers of all sources. By the first warp.
__device__ __forceinline__ sync::Came await_headers(const LowLatencyDispatchArgs& args, const RowShape& shape,
                                                    BlockState& block) {
    const LowLatencyDomain& ll = args.ll;
    const int num_ranks = ll.domain.num_ranks, turn = static_cast<int>(threadIdx.x);
    const int source = source_of(ll.domain, turn);
    sync::Came came = sync::Came::kMasked;
    LowLatencyHeader header{};
    if (turn < num_ranks) {
        block.waited_ns[source] = 0;
        came = sync::await_header(ll, kKind, source, block.epoch, args.signature, header,
                                  &block.waited_ns[source]);
        if (came == sync::Came::kHere) {
            take_header(args, shape, header, source, block);
        } else {
            atomicOr(&block.absent, came == sync::Came::kFailed ? ~0u : 1u << source);
        }
    }
    return static_cast<sync::Came>(
        __reduce_max_sync(kAllLanes, came == sync::Came::kFailed ? static_cast<unsigned>(came) : 0u));
}

// Waits for the counts of the sources in `of` but not in block.absent, into table [num_ranks, num_local]. False after a
// failure.
__device__ __forceinline__ bool await_counts(const LowLatencyDispatchArgs& args, BlockState& block,
                                             unsigned of, int num_local, const SmallDivider& by_local,
                                             uint32_t* table) {
    const LowLatencyDomain& ll = args.ll;
    const uint8_t* own = ll.region[ll.domain.rank];
    const int set = set_of(block.epoch);
    const auto* absent = const_cast<const volatile unsigned*>(&block.absent);
    bool is_good = true;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < ll.domain.num_ranks * num_local; i += kNumThreads) {
        const int source = by_local.quotient(i);
        if ((of >> source & 1u) == 0) continue;
        const uint8_t* at =
            own + ll.layout.dispatch_counts(set, source) + static_cast<int64_t>(i - source * num_local) * 8;
        uint64_t word = 0;
        bool is_absent = false;
        const sync::Came came =
            sync::wait_for_peer(ll, kKind, Phase::kAnnouncement, source, block.epoch, [&](uint64_t& seen) {
                word = sync::peek_word(at);
                seen = word >> 32;
                if (sync::is_here(word, block.epoch)) return true;
                is_absent = (*absent >> source & 1u) != 0;
                return is_absent;
            });
        table[i] = is_absent || came != sync::Came::kHere ? 0 : static_cast<uint32_t>(word);
        if (came == sync::Came::kMasked) atomicOr(&block.absent, 1u << source);
        is_good = is_good && came != sync::Came::kFailed;
    }
    return is_good;
}

// All blocks take the same sources for present. By the first warp: lays the pieces of those out behind one another.
__device__ __forceinline__ void agree(const LowLatencyDispatchArgs& args, const RowShape& shape,
                                      BlockState& block) {
    const LowLatencyDomain& ll = args.ll;
    const int num_ranks = ll.domain.num_ranks, turn = static_cast<int>(threadIdx.x);
    const int source = source_of(ll.domain, turn);
    bool is_here = false;
    int own = 0;
    if (turn < num_ranks) {
        const bool has_come = (block.absent >> source & 1u) == 0;
        is_here = sync::decide(ll, kKind, block.epoch, source, has_come);
        if (is_here && !has_come) {
            // Another block has seen all of it.
            take_header(args, shape, sync::read_header(ll, kKind, source, block.epoch), source, block);
        }
        if (!is_here) block.num_tokens[source] = 0;
        if (is_here) own = block.num_tokens[source] * block.num_pieces[source];
    }
    const unsigned present = __reduce_or_sync(kAllLanes, is_here ? 1u << source : 0u);
    int sum = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, offset);
        if (turn >= offset) sum += other;
    }
    if (turn < num_ranks) block.first_item[turn] = sum - own;
    if (turn == num_ranks - 1) block.num_items = sum;
    if (turn == 0) block.present = present;
}

// What says where the rows lie, and turns the table's counts into what lies before. By all threads of a block.
__device__ void place_rows(const LowLatencyDispatchArgs& args, const BlockState& block, int num_local,
                           uint32_t* table) {
    const int num_ranks = args.ll.domain.num_ranks, num_placed = args.expert_major ? num_local : 0;
    const bool writes = is_leader();
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < num_placed; e += kNumThreads) {
        uint32_t sum = 0;
#pragma unroll 1
        for (int source = 0; source < num_ranks; ++source) {
            uint32_t* at = &table[source * num_local + e];
            const uint32_t count = (block.present >> source & 1u) != 0 ? *at : 0;
            *at = sum;
            if (writes) {
                args.layout_range[static_cast<int64_t>(e) * num_ranks + source] =
                    static_cast<int64_t>(sum) << 32 | count;
            }
            sum += count;
        }
        if (!writes) continue;
        args.recv_count[e] = static_cast<int32_t>(sum);
        if (args.recv_stats != nullptr) args.recv_stats[e] += static_cast<int32_t>(sum);
    }
    if (writes && threadIdx.x < num_ranks) {
        const int num_tokens = block.num_tokens[threadIdx.x];
        args.source_tokens[threadIdx.x] = num_tokens;
        if (!args.expert_major) args.recv_count[threadIdx.x] = num_tokens;
    }
}

// Where rows lie by source: nobody wants the tokens that a source does not have. By all threads of the grid.
__device__ __forceinline__ void clear_unused(const LowLatencyDispatchArgs& args, const BlockState& block) {
    const int num_threads = static_cast<int>(gridDim.x) * kNumThreads;
    const int64_t num_selections = static_cast<int64_t>(args.num_max_tokens) * args.num_topk;
#pragma unroll 1
    for (int source = 0; source < args.ll.domain.num_ranks; ++source) {
        int64_t i = block.num_tokens[source] * args.num_topk +
                    static_cast<int>(blockIdx.x * kNumThreads + threadIdx.x);
#pragma unroll 1
        for (; i < num_selections; i += num_threads) {
            args.positions[source * num_selections + i] = -1;
            if (args.weights != nullptr) args.weights[source * num_selections + i] = 0.0f;
        }
    }
}

// Waits for all sources: what they send, and where it goes. By all threads of a block. table [num_ranks, num_local]: where
// the rows of a source in an expert begin. The same answer for all: false after a failure.
__device__ bool await_sources(const LowLatencyDispatchArgs& args, BlockState& block, int num_local,
                              const SmallDivider& by_local, uint32_t* table) {
    const RowShape shape = RowShape::of(args.hidden, args.use_fp8, args.format);
    bool is_good = true;
    if (threadIdx.x < 32) is_good = await_headers(args, shape, block) != sync::Came::kFailed;
    if (args.expert_major) is_good = await_counts(args, block, ~0u, num_local, by_local, table) && is_good;
    if (__syncthreads_and(is_good) == 0) return false;
    if (threadIdx.x < 32) agree(args, shape, block);
    __syncthreads();
    const unsigned again = block.present & block.absent;
    if (again != 0 && args.expert_major) {
        if (threadIdx.x == 0) block.absent = 0;
        __syncthreads();
        is_good = await_counts(args, block, again, num_local, by_local, table);
        if (__syncthreads_and(is_good) == 0) return false;
    }
    place_rows(args, block, num_local, table);
    if (!args.expert_major) clear_unused(args, block);
    __syncthreads();
    return true;
}

// A selection of a source's token that lies with this rank.
struct Target {
    int32_t entry;  // -1: of another rank
    int in_group;   // row among those of the expert, or of the source
    int64_t row;    // among all rows
};

// Rows of an expert, or of a source.
__device__ __forceinline__ int64_t group_rows(const LowLatencyDispatchArgs& args) {
    return static_cast<int64_t>(args.expert_major ? args.ll.domain.num_ranks : 1) * args.num_max_tokens;
}

// Waits for the entries of a token, one a lane; none if the source was masked meanwhile. False after a failure.
__device__ __forceinline__ bool await_entries(const LowLatencyDispatchArgs& args, const BlockState& block,
                                              int source, int token, uint64_t word, int num_local,
                                              const uint32_t* table, Target& target) {
    const LowLatencyDomain& ll = args.ll;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const uint8_t* at = ll.region[ll.domain.rank] + ll.layout.dispatch_entries(set_of(block.epoch), source) +
                        (static_cast<int64_t>(token) * args.num_topk + lane) * 8;
    const sync::Came came =
        sync::wait_by_lanes(ll, kKind, Phase::kPushed, source, block.epoch,
                            lane >= args.num_topk || sync::is_here(word, block.epoch), [&] {
                                word = sync::peek_word(at);
                                return sync::is_here(word, block.epoch);
                            });
    target = {-1, 0, -1};
    if (came == sync::Came::kFailed) return false;
    if (came == sync::Came::kHere && lane < args.num_topk) target.entry = static_cast<int32_t>(word);
    if (target.entry >= 0) {
        int group = source;
        target.in_group = token;
        if (args.expert_major) {
            group = entry_expert(target.entry);
            target.in_group =
                static_cast<int>(table[source * num_local + group]) + entry_ordinal(target.entry);
        }
        target.row = group * group_rows(args) + target.in_group;
    }
    return true;
}

// Keeps the weights of a token's targets for combine. False after a failure.
__device__ __forceinline__ bool keep_weights(const LowLatencyDispatchArgs& args, const BlockState& block,
                                             int source, int token, const Target& target) {
    const LowLatencyDomain& ll = args.ll;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const uint8_t* at = ll.region[ll.domain.rank] + ll.layout.dispatch_weights(set_of(block.epoch), source) +
                        (static_cast<int64_t>(token) * args.num_topk + lane) * 8;
    uint64_t word = 0;
    const auto try_once = [&] {
        word = sync::peek_word(at);
        return sync::is_here(word, block.epoch);
    };
    const bool is_here = target.entry < 0 || try_once();
    const auto came = sync::wait_by_lanes(ll, kKind, Phase::kPushed, source, block.epoch, is_here, try_once);
    if (came == sync::Came::kFailed) return false;
    if (lane < args.num_topk) {
        const bool counts = target.entry >= 0 && came == sync::Came::kHere;
        const int64_t row = static_cast<int64_t>(source) * args.num_max_tokens + token;
        args.weights[row * args.num_topk + lane] =
            counts ? __uint_as_float(static_cast<uint32_t>(word)) : 0.0f;
    }
    return true;
}

// Adds a token to the statistics of its experts, where no counts tell: once to each, however often it names it.
__device__ __noinline__ void count_token(int32_t* recv_stats, int32_t entry) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    bool is_first = entry >= 0;
#pragma unroll 1
    for (int before = 0; before < 32; ++before) {
        const int32_t other = __shfl_sync(kAllLanes, entry, before);
        is_first = is_first && (before >= lane || other != entry);
    }
    if (is_first) atomicAdd(&recv_stats[entry_expert(entry)], 1);
}

// Writes a step to the rows of all lanes' targets. By source they are one row.
__device__ __forceinline__ void fan_out(const LowLatencyDispatchArgs& args, const RowShape& shape,
                                        const RowStep& what, const Target& target, int step) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t capacity = group_rows(args);
    unsigned left = __ballot_sync(kAllLanes, target.entry >= 0);
    if (!args.expert_major) left &= 0u - left;
#pragma unroll 1
    for (; left != 0; left &= left - 1) {
        const int k = __ffs(left) - 1;
        const int64_t to = __shfl_sync(kAllLanes, target.row, k);
        const int64_t in_its_group = __shfl_sync(kAllLanes, target.in_group, k);
        const int64_t first_scale = (to - in_its_group) * shape.scale_words + in_its_group;
        store_step(what, args.rows + to * shape.num_bytes, args.scales + first_scale, capacity, shape, step,
                   lane);
    }
}

// Copies each piece that has come to the rows of the experts that want it, or to its one row. A warp a piece. Rows of a rank
// that is masked meanwhile are zeros, since ranges or positions count them.
template <bool kFp8>
__device__ void receive_rows(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                             const BlockState& block, int num_local, const uint32_t* table) {
    const LowLatencyDomain& ll = args.ll;
    const RowShape shape = RowShape::of(args.hidden, kFp8, args.format);
    const int num_ranks = ll.domain.num_ranks, rank = ll.domain.rank, num_topk = args.num_topk;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int set = set_of(block.epoch);
    const uint64_t epoch = block.epoch;
    uint8_t* own = ll.region[rank];
    const int first_item = lane < num_ranks ? block.first_item[lane] : INT32_MAX;
    // The own items come first. Blocks that send nothing, if there are any, do these alone.
    const int num_blocks = static_cast<int>(gridDim.x), index = static_cast<int>(blockIdx.x);
    const int num_idle = num_blocks - 1 - plan.num_senders, idle_index = index - 1 - plan.num_senders;
    const int num_apart = num_idle > 0 && num_ranks > 1 ? block.first_item[1] : 0;
    int apart = idle_index >= 0 ? idle_index + warp * num_idle : num_apart;
    int shared = num_apart + index + warp * num_blocks;
#pragma unroll 1
    while (apart < num_apart || shared < block.num_items) {
        const bool is_apart = apart < num_apart;
        const int item = is_apart ? apart : shared;
        apart += is_apart ? num_idle * kNumWarps : 0;
        shared += is_apart ? 0 : num_blocks * kNumWarps;
        const int turn = __popc(__ballot_sync(kAllLanes, first_item <= item)) - 1;
        const int source = source_of(ll.domain, turn);
        const int index = item - __shfl_sync(kAllLanes, first_item, turn);
        const int token = block.by_pieces[source].quotient(index);
        const int piece = index - token * block.num_pieces[source];
        // In one launch the own rows come from x, as this rank would have sent them.
        const bool is_own = source == rank && plan.part == LowLatencyPart::kWhole;
        const bool packets = !is_own && (block.packets >> source & 1u) != 0;
        const int begin = piece * block.piece_steps[source];
        const int end = min(begin + block.piece_steps[source], shape.num_steps);
        uint8_t* packet_row = own + ll.layout.dispatch_packets(set, source, packets ? token : 0);
        const uint8_t* slot = own + ll.layout.dispatch_slot(set, source, token);
        // All that is awaited is loaded once before any of it is.
        uint64_t word = 0;
        if (lane < num_topk) {
            word = sync::peek_word(own + ll.layout.dispatch_entries(set, source) +
                                   (static_cast<int64_t>(token) * num_topk + lane) * 8);
        }
        PeekedStep peeked{};
        if (packets) peeked = peek_step(packet_row, begin, lane);
        Target target;
        sync::Came came = sync::Came::kHere;
#pragma unroll 1
        for (int step = begin; step < end; ++step) {
            RowStep what{};
            if (is_own) {
                const uint8_t* x = args.x + static_cast<int64_t>(token) * args.hidden * 2;
                what = encode<kFp8>(load_source<kFp8>(x, shape, step, lane), shape, step, args.format, lane);
            }
            if (step == begin) {
                if (!await_entries(args, block, source, token, word, num_local, table, target)) return;
                if (__ballot_sync(kAllLanes, target.entry >= 0) == 0) break;
                if (packets) {
                    came = await_step(ll, kKind, source, epoch, packet_row, step, lane, peeked);
                } else if (!is_own) {
                    came = sync::await_piece(ll, kKind, source,
                                             ll.layout.dispatch_flag(set, source, token, piece), epoch);
                }
                if (came == sync::Came::kFailed) return;
            }
            if (!is_own && came == sync::Came::kHere) {
                what = packets ? peeked.step()
                               : load_step(slot, reinterpret_cast<const uint32_t*>(slot + shape.num_bytes),
                                           shape, step, lane);
            }
            fan_out(args, shape, what, target, step);
        }
        if (piece != 0) continue;
        if (args.expert_major && target.entry >= 0) args.src_info[target.row] = token;
        if (lane < num_topk) {
            const int64_t at = (static_cast<int64_t>(source) * args.num_max_tokens + token) * num_topk + lane;
            const int expert = target.entry < 0 ? -1 : entry_expert(target.entry);
            args.positions[at] =
                expert < 0 || !args.expert_major ? expert : pack_position(expert, target.in_group);
        }
        if (!args.expert_major && args.recv_stats != nullptr) count_token(args.recv_stats, target.entry);
        if (args.weights != nullptr && !keep_weights(args, block, source, token, target)) return;
    }
}

// Block 0 announces, the others send; then all of them receive. No block waits for rows of its own grid; for what block 0
// announces it waits, and block 0 has started before it.
template <bool kFp8, class Index>
__global__ void __launch_bounds__(kNumThreads, 1)
    low_latency_dispatch(const __grid_constant__ LowLatencyDispatchArgs args, const DispatchPlan plan) {
    extern __shared__ uint32_t scratch[];
    __shared__ BlockState block;
    const LowLatencyDomain& ll = args.ll;
    if (threadIdx.x == 0) block.absent = block.packets = 0;
    ptx::wait_for_earlier_kernels();
    if (plan.overlaps) ptx::launch_dependents();
    // By another warp than the one that begins.
    if (is_leader() && threadIdx.x / 32 == kNumWarps - 1) sync::tell_consumed(ll, kKind);
    if (plan.part == LowLatencyPart::kReceive) {
        if (threadIdx.x == 0) block.epoch = *args.ticket;
        __syncthreads();
    } else {
        const bool alone = gridDim.x == 1;
        if (blockIdx.x == 0) announce<Index>(args, plan, block, scratch);
        if (blockIdx.x != 0 || alone) {
            send_rows<kFp8, Index>(args, plan, block, alone ? 0 : 1, plan.num_senders, !alone);
        }
    }
    if (plan.part == LowLatencyPart::kSend) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *args.ticket = block.epoch;
        return;
    }
    // The scratch memory changes hands.
    __syncthreads();
    const int num_local = plan.experts.count(ll.domain.rank);
    if (await_sources(args, block, num_local, plan.by_local, scratch)) {
        receive_rows<kFp8>(args, plan, block, num_local, scratch);
    }
    if (!is_leader()) return;
    __syncthreads();
    if (threadIdx.x == 0) sync::note_received(ll, kKind, block.epoch);
    if (threadIdx.x < ll.domain.num_ranks) {
        sync::keep_wait(ll, kKind, static_cast<int>(threadIdx.x), block.waited_ns[threadIdx.x],
                        args.wait_stats);
    }
}

__global__ void __launch_bounds__(kMaxPeers)
    low_latency_dispatch_combine_refuse(const __grid_constant__ LowLatencyDomain ll, LowLatencyKind kind) {
    const int peer = static_cast<int>(threadIdx.x);
    const bool is_peer = peer < ll.domain.num_ranks;
    uint64_t epoch = 0;
    if (peer == 0) epoch = sync::begin_operation(ll, kind);
    epoch = __shfl_sync(kAllLanes, epoch, 0);
    sync::tell_consumed(ll, kind);
    sync::Room room{};
    if (is_peer) room = sync::peek_room(ll, kind, peer);
    if (is_peer && sync::await_room(ll, kind, epoch, peer, room) == sync::Came::kHere) {
        sync::publish_header(ll, kind, peer, epoch, {kRefusedTag, 0, 0, 0});
    }
    __syncwarp();
    // What peers still send into this set lies there unread; they use it again in a later operation of their own.
    if (peer == 0) sync::note_received(ll, kind, epoch);
}

using Kernel = void (*)(LowLatencyDispatchArgs, DispatchPlan);

Kernel kernel_of(bool use_fp8, bool topk_is_int64) {
    if (use_fp8)
        return topk_is_int64 ? low_latency_dispatch<true, int64_t> : low_latency_dispatch<true, int32_t>;
    return topk_is_int64 ? low_latency_dispatch<false, int64_t> : low_latency_dispatch<false, int32_t>;
}

}  // namespace

void prepare_low_latency_dispatch() {
    for (const bool use_fp8 : {false, true}) {
        for (const bool is_int64 : {false, true})
            load_kernel(kernel_of(use_fp8, is_int64), "low_latency_dispatch");
    }
    load_kernel(low_latency_dispatch_combine_refuse, "low_latency_dispatch_combine_refuse");
}

void launch_low_latency_dispatch(const LowLatencyDispatchArgs& args, LowLatencyPart part, int num_sms,
                                 Stream stream) {
    const char* name = "low_latency_dispatch";
    const int64_t num_ranks = args.ll.domain.num_ranks, num_tokens = args.num_tokens;
    check_limit(args.num_experts, kMaxLayoutExperts, name, "the number of experts");
    check_limit(args.num_topk, args.ll.layout.num_topk, name, "the number of selections of a token");
    check_limit(args.num_max_tokens, args.ll.layout.num_max_tokens, name, "the largest number of tokens");
    check_limit(num_tokens, args.num_max_tokens, name, "the number of tokens");
    check_limit(num_ranks * args.num_max_tokens, kMaxPackedRows, name, "the number of rows of an expert");
    const RowShape shape = RowShape::of(args.hidden, args.use_fp8, args.format);
    check_limit(shape.num_bytes + 4 * shape.scale_words, args.ll.layout.slot_bytes, name,
                "the size of a row");

    // Packets take half as much again on the link, and arrive sooner.
    const bool packets = num_tokens <= args.ll.layout.packet_tokens;
    if (packets)
        check_limit(shape.num_steps * kPacketStepBytes, args.ll.layout.packet_row_bytes, name,
                    "a row in packets");
    // A piece is as short as leaves one for each warp, on the way out and on the way in.
    const int64_t num_warps = static_cast<int64_t>(num_sms) * kNumWarps;
    const RowPieces pieces =
        cut_row(shape.num_bytes, num_warps / std::max<int64_t>(num_ranks * num_tokens, 1));
    // Other ranks may send more tokens than this one does.
    const int64_t likely_tokens = std::max<int64_t>(num_tokens, (args.num_max_tokens + 3) / 4);
    const int64_t likely_items = likely_tokens * num_ranks * (packets ? shape.num_steps : pieces.count);
    const int64_t blocks = (likely_items + kItemsPerBlock - 1) / kItemsPerBlock;
    const int64_t num_blocks = std::clamp<int64_t>(blocks, std::min(num_sms, 2), num_sms);
    // Where rows keep the link busy for long, half of the blocks deal with the own ones meanwhile.
    const bool shares = !packets && part == LowLatencyPart::kWhole && num_ranks > 1 && num_blocks > 2;
    const auto num_senders = static_cast<int>(shares ? num_blocks / 2 : std::max<int64_t>(num_blocks - 1, 1));
    // Of the scratch memory one word an expert is for the sums; later it takes the counts of all sources.
    const int64_t most_words = kScratchBytes / 4 / std::max(args.num_experts, 1) - 1;
    const auto chunk_words =
        static_cast<int>(std::clamp<int64_t>((num_tokens + 31) / 32, 1, std::max<int64_t>(most_words, 1)));
    const ExpertMap experts = ExpertMap::of(args.num_experts, static_cast<int>(num_ranks));
    const int num_local = experts.count(args.ll.domain.rank);
    const int64_t num_words =
        std::max<int64_t>(static_cast<int64_t>(args.num_experts) * (1 + chunk_words), num_ranks * num_local);
    const size_t shared_bytes = args.expert_major ? sizeof(uint32_t) * num_words : 0;
    launch_early(kernel_of(args.use_fp8, args.topk_is_int64), static_cast<unsigned>(num_blocks), kNumThreads,
                 shared_bytes, static_cast<cudaStream_t>(stream), name, args,
                 DispatchPlan{part, may_overlap(args.ll.domain, num_sms), packets, pieces, num_senders,
                              chunk_words, experts, SmallDivider::of(args.num_topk),
                              SmallDivider::of(packets ? shape.num_steps : pieces.count),
                              SmallDivider::of(std::max(num_local, 1))});
}

void launch_low_latency_refuse(const LowLatencyDomain& ll, LowLatencyKind kind, Stream stream) {
    low_latency_dispatch_combine_refuse<<<1, kMaxPeers, 0, static_cast<cudaStream_t>(stream)>>>(ll, kind);
    check_launch("low_latency_dispatch_combine_refuse");
}

}  // namespace deep_ep
