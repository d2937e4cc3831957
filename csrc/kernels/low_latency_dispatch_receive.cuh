// Low-latency dispatch, the rank of the experts: where rows go, and their way there.
#pragma once

#include "kernels/low_latency_dispatch.cuh"

namespace deep_ep::ll_dispatch {

// The sources by turn, from the own rank on.
__device__ __forceinline__ int source_of(const Domain& domain, int turn) {
    const int source = domain.rank + turn;
    return source < domain.num_ranks ? source : source - domain.num_ranks;
}

// What a source's header says. Within bounds whatever it says, as after a bug that a test planted.
__device__ __forceinline__ void take_header(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                                            const LowLatencyHeader& header, int source, BlockState& block) {
    const LowLatencyDomain& ll = args.ll;
    const uint8_t* own = ll.region[ll.domain.rank];
    const int set = set_of(block.epoch);
    block.entries[source] = own + ll.layout.dispatch_entries(set, source);
    block.lines[source] = own + ll.layout.dispatch_lines(set, source, 0);
    const bool in_lines = header.num_pieces == 0;
    const int most =
        in_lines ? min(ll.layout.dispatch_line_tokens, args.num_max_tokens) : args.num_max_tokens;
    block.num_tokens[source] = min(max(header.num_tokens, 0), most);
    block.num_pieces[source] = in_lines ? plan.shape.num_steps : min(header.num_pieces, kMaxRowPieces);
    // Mostly as this rank sends: a division takes longer than all the rest.
    const bool is_alike = block.num_pieces[source] == plan.num_pieces();
    block.by_pieces[source] = is_alike ? plan.by_pieces : SmallDivider::of(block.num_pieces[source]);
    block.piece_steps[source] = in_lines ? 1 : max(header.piece_steps, 1);
    if (in_lines) atomicOr(&block.in_lines, 1u << source);
}

// Waits for the headers of all sources. By one warp. False after a failure.
__device__ __forceinline__ bool await_headers(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                                              BlockState& block) {
    const LowLatencyDomain& ll = args.ll;
    const int num_ranks = ll.domain.num_ranks, turn = static_cast<int>(threadIdx.x % 32);
    const int source = source_of(ll.domain, turn);
    sync::Came came = sync::Came::kMasked;
    LowLatencyHeader header{};
    if (turn < num_ranks) {
        block.waited_ns[source] = 0;
        came = sync::await_header(ll, kKind, source, block.epoch, args.signature, header,
                                  &block.waited_ns[source]);
        if (came == sync::Came::kHere) {
            take_header(args, plan, header, source, block);
        } else {
            atomicOr(&block.absent, came == sync::Came::kFailed ? ~0u : 1u << source);
        }
    }
    const bool is_good = __all_sync(kAllLanes, came != sync::Came::kFailed);
    if (!is_good && turn == 0) block.has_failed = 1;
    return is_good;
}

// Waits for the counts of the sources in `of` but not in block.absent, into table [num_ranks, num_local]. By all warps but
// the hearing one, which comes late. False after a failure.
__device__ __forceinline__ bool await_counts(const LowLatencyDispatchArgs& args, BlockState& block,
                                             unsigned of, int num_local, const SmallDivider& by_local,
                                             uint32_t* table) {
    const LowLatencyDomain& ll = args.ll;
    const uint8_t* own = ll.region[ll.domain.rank];
    const int set = set_of(block.epoch);
    const auto* absent = const_cast<const volatile unsigned*>(&block.absent);
    bool is_good = true;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
    if (warp == kHearingWarp) return true;
#pragma unroll 1
    for (int i = thread - (warp > kHearingWarp ? 32 : 0); i < ll.domain.num_ranks * num_local;
         i += kNumThreads - 32) {
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

// All blocks take the same sources for present. By one warp: lays the pieces of those out behind one another.
__device__ __forceinline__ void agree(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                                      BlockState& block) {
    const LowLatencyDomain& ll = args.ll;
    const int num_ranks = ll.domain.num_ranks, turn = static_cast<int>(threadIdx.x % 32);
    const int source = source_of(ll.domain, turn);
    bool is_here = false;
    int own = 0;
    if (turn < num_ranks) {
        const bool has_come = (block.absent >> source & 1u) == 0;
        is_here = sync::decide(ll, kKind, block.epoch, source, has_come);
        if (is_here && !has_come) {
            // Another block has seen all of it.
            take_header(args, plan, sync::read_header(ll, kKind, source, block.epoch), source, block);
        }
        if (!is_here) block.num_tokens[source] = 0;
        if (is_here) own = block.num_tokens[source] * block.num_pieces[source];
    }
    const unsigned present = __reduce_or_sync(kAllLanes, is_here ? 1u << source : 0u);
    int sum = own;
#pragma unroll 1
    for (int offset = 1; offset < num_ranks; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, offset);
        if (turn >= offset) sum += other;
    }
    if (turn < num_ranks) block.first_item[turn] = sum - own;
    if (turn == num_ranks - 1) block.num_items = sum;
    if (turn == 0) block.present = present;
}

// What says where the rows lie. By threads of one block, after all counts are there.
template <bool kBySource>
__device__ void tell_places(const LowLatencyDispatchArgs& args, const BlockState& block, int num_local,
                            const uint32_t* table) {
    const int num_ranks = args.ll.domain.num_ranks, num_placed = kBySource ? 0 : num_local;
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < num_placed; e += kNumThreads) {
        uint32_t sum = 0;
#pragma unroll 1
        for (int source = 0; source < num_ranks; ++source) {
            const uint32_t count = (block.present >> source & 1u) != 0 ? table[source * num_local + e] : 0;
            args.layout_range[static_cast<int64_t>(e) * num_ranks + source] =
                static_cast<int64_t>(sum) << 32 | count;
            sum += count;
        }
        args.recv_count[e] = static_cast<int32_t>(sum);
        if (args.recv_stats != nullptr) args.recv_stats[e] += static_cast<int32_t>(sum);
    }
    if (threadIdx.x < num_ranks) {
        const int num_tokens = block.num_tokens[threadIdx.x];
        args.source_tokens[threadIdx.x] = num_tokens;
        if (kBySource) args.recv_count[threadIdx.x] = num_tokens;
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

// Where ranks may be masked, once the headers are there: waits for the counts too, as only who has sent both takes part, and
// agrees on who does. By all threads of a block, with the same answer: false after a failure. Apart, as few use it.
template <bool kBySource>
__device__ __noinline__ bool agree_with_counts(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                                               BlockState& block, uint32_t* table) {
    const int num_local = plan.experts.count(args.ll.domain.rank);
    const SmallDivider& by_local = plan.by_local;
    bool is_good = true;
    if (!kBySource) is_good = await_counts(args, block, ~0u, num_local, by_local, table);
    if (__syncthreads_and(is_good) == 0) return false;
    if (threadIdx.x < 32) agree(args, plan, block);
    __syncthreads();
    const unsigned again = block.present & block.absent;
    if (kBySource || again == 0) return true;
    // All have read it before it changes.
    __syncthreads();
    if (threadIdx.x == 0) block.absent = 0;
    __syncthreads();
    is_good = await_counts(args, block, again, num_local, by_local, table);
    return __syncthreads_and(is_good) != 0;
}

// A thread's part of the counts is in the table.
//
// Order: each thread's arrival releases to the block what it stored; pairs with await_warps(), which acquires it. So it is with
// the headers. One arrival for a warp, after its barrier, would do by the memory model, but racecheck reports it.
__device__ __forceinline__ void arrive_with_counts(BlockState& block, bool is_good) {
    if (!is_good) block.has_failed = 1;
    ptx::mbarrier_arrive(&block.counted);
}

// Waits for warps of the block, once each barrier, so its first phase. False after a failure of one. They arrive, as none of
// them waits for a peer without a deadline, so this needs none of its own.
__device__ __forceinline__ bool await_warps(BlockState& block, uint64_t& barrier) {
    while (!ptx::mbarrier_try_wait(&barrier, 0)) {
    }
    return const_cast<const volatile unsigned&>(block.has_failed) == 0;
}

// A selection of a source's token that lies with this rank.
struct Target {
    int32_t entry;  // -1: of another rank
    int in_group;   // row among those of the expert, or of the source
    int64_t row;    // among all rows
};

// Rows of an expert, or of a source.
template <bool kBySource>
__device__ __forceinline__ int64_t group_rows(const LowLatencyDispatchArgs& args) {
    return static_cast<int64_t>(kBySource ? 1 : args.ll.domain.num_ranks) * args.num_max_tokens;
}

// Where a token's entries come, one a lane.
__device__ __forceinline__ const uint8_t* entry_of(const LowLatencyDispatchArgs& args,
                                                   const BlockState& block, int source, int token) {
    return block.entries[source] + (token * args.num_topk + static_cast<int>(threadIdx.x % 32)) * 8;
}

// Where a token's row comes in lines.
__device__ __forceinline__ const uint8_t* lines_of(const LowLatencyDispatchArgs& args,
                                                   const BlockState& block, int source, int token) {
    return block.lines[source] + token * args.ll.layout.line_row_bytes;
}

// Waits for the entries of a token, one a lane: -1 for none, and if the source was masked meanwhile. False after a failure.
__device__ __forceinline__ bool await_entries(const LowLatencyDispatchArgs& args, const BlockState& block,
                                              int source, int token, uint64_t word, int32_t& entry) {
    const LowLatencyDomain& ll = args.ll;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const uint8_t* at = entry_of(args, block, source, token);
    const sync::Came came =
        sync::wait_by_lanes(ll, kKind, Phase::kPushed, source, block.epoch,
                            lane >= args.num_topk || sync::is_here(word, block.epoch), [&] {
                                word = sync::peek_word(at);
                                return sync::is_here(word, block.epoch);
                            });
    entry = came == sync::Came::kHere && lane < args.num_topk ? static_cast<int32_t>(word) : -1;
    return came != sync::Came::kFailed;
}

// Where the token of the lane's entry goes, once the counts of all sources are there.
template <bool kBySource>
__device__ __forceinline__ Target place(const LowLatencyDispatchArgs& args, const BlockState& block,
                                        int source, int token, int32_t entry, int num_local,
                                        const uint32_t* table) {
    Target target{entry, 0, -1};
    if (entry < 0) return target;
    int group = source;
    target.in_group = token;
    if (!kBySource) {
        group = entry_expert(entry);
        uint32_t before = entry_ordinal(entry);
#pragma unroll 1
        for (int earlier = 0; earlier < source; ++earlier)
            before += (block.present >> earlier & 1u) != 0 ? table[earlier * num_local + group] : 0;
        target.in_group = static_cast<int>(before);
    }
    target.row = group * group_rows<kBySource>(args) + target.in_group;
    return target;
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
template <bool kBySource>
__device__ __forceinline__ void fan_out(const LowLatencyDispatchArgs& args, const RowShape& shape,
                                        const RowStep& what, const Target& target, int step) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t capacity = group_rows<kBySource>(args);
    // Each lane of its own target, and the others ask for them: the loop is what takes time.
    const int64_t first_scale = (target.row - target.in_group) * shape.scale_words + target.in_group;
    const auto row_at = reinterpret_cast<unsigned long long>(args.rows + target.row * shape.num_bytes);
    const auto scale_at = reinterpret_cast<unsigned long long>(args.scales + first_scale);
    unsigned left = __ballot_sync(kAllLanes, target.entry >= 0);
    if (kBySource) left &= 0u - left;
    // Two at a time, as a warp waits for what it asks.
#pragma unroll 1
    while (left != 0) {
        const int first = __ffs(left) - 1;
        left &= left - 1;
        const int second = left != 0 ? __ffs(left) - 1 : first;
        left &= left - 1;
        const auto row = __shfl_sync(kAllLanes, row_at, first),
                   other = __shfl_sync(kAllLanes, row_at, second);
        const auto scale = __shfl_sync(kAllLanes, scale_at, first),
                   other_scale = __shfl_sync(kAllLanes, scale_at, second);
        store_step(what, reinterpret_cast<uint8_t*>(row), reinterpret_cast<uint32_t*>(scale), capacity, shape,
                   step, lane);
        if (second == first) continue;
        store_step(what, reinterpret_cast<uint8_t*>(other), reinterpret_cast<uint32_t*>(other_scale),
                   capacity, shape, step, lane);
    }
}

// The pieces that a warp deals with, one after the other. The own ones come first; blocks that send nothing, if there are any,
// do these alone. Where there are but a few, the blocks that come late have none: the one that announces and the leader.
struct ItemWalk {
    int apart, num_apart, apart_stride;
    int shared, shared_stride;

    // num_own: own pieces.
    __device__ __forceinline__ ItemWalk(const DispatchPlan& plan, int num_ranks, int num_own) {
        const int num_blocks = plan.num_receivers, index = static_cast<int>(blockIdx.x) - plan.first_receiver;
        const bool receives = index >= 0 && index < num_blocks;
        // From the last warp on, as the first ones send and wait for headers.
        const int warp = kNumWarps - 1 - static_cast<int>(threadIdx.x / 32);
        const int num_idle = static_cast<int>(gridDim.x) - 1 - plan.num_senders;
        const int idle_index = static_cast<int>(blockIdx.x) - 1 - plan.num_senders;
        num_apart = num_idle > 0 && num_ranks > 1 ? num_own : 0;
        apart = idle_index >= 0 ? idle_index + warp * num_idle : num_apart;
        apart_stride = num_idle * kNumWarps;
        shared = receives ? num_apart + index + warp * num_blocks : INT32_MAX;
        shared_stride = receives ? num_blocks * kNumWarps : 0;
    }
    __device__ __forceinline__ int next() {
        const bool is_apart = apart < num_apart;
        const int item = is_apart ? apart : shared;
        apart += is_apart ? apart_stride : 0;
        shared += is_apart ? 0 : shared_stride;
        return item;
    }
};

// A piece, and what lay where it comes when it was opened: all that is awaited is loaded once before any of it is.
struct Item {
    int source, token, piece;
    int begin, end;  // steps
    bool is_own;     // in one launch the own rows come from x, as this rank would have sent them
    bool in_lines;
    uint64_t word;  // the lane's entry
    PeekedStep peeked;
};

// By all lanes of a warp. num_early: pieces, the own ones, that are as this rank would have sent them. looks: the headers are
// there, so that entries may be.
__device__ __forceinline__ Item open_item(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                                          const BlockState& block, const RowShape& shape, int num_early,
                                          bool looks, int number) {
    const LowLatencyDomain& ll = args.ll;
    const int lane = static_cast<int>(threadIdx.x % 32);
    Item item{};
    item.source = ll.domain.rank;
    int index = number, piece_steps = plan.piece_steps();
    SmallDivider by_pieces = plan.by_pieces;
    if (number >= num_early) {
        const int first_item = lane < ll.domain.num_ranks ? block.first_item[lane] : INT32_MAX;
        const int turn = __popc(__ballot_sync(kAllLanes, first_item <= number)) - 1;
        index = number - __shfl_sync(kAllLanes, first_item, turn);
        item.source = source_of(ll.domain, turn);
        by_pieces = block.by_pieces[item.source];
        piece_steps = block.piece_steps[item.source];
        item.in_lines = (block.in_lines >> item.source & 1u) != 0;
    }
    item.token = by_pieces.quotient(index);
    item.piece = index - item.token * by_pieces.divisor;
    item.is_own = item.source == ll.domain.rank && plan.part == LowLatencyPart::kWhole;
    item.in_lines = item.in_lines && !item.is_own;
    item.begin = item.piece * piece_steps;
    item.end = min(item.begin + piece_steps, shape.num_steps);
    item.word = ~block.epoch << 32;
    if (looks && lane < args.num_topk)
        item.word = sync::peek_word(entry_of(args, block, item.source, item.token));
    if (item.in_lines)
        item.peeked = peek_step(lines_of(args, block, item.source, item.token), item.begin, lane);
    return item;
}

// Waits for a piece of another rank, or for its first step in lines. Of a masked rank nothing comes.
__device__ __forceinline__ sync::Came await_item(const LowLatencyDispatchArgs& args, const BlockState& block,
                                                 Item& item) {
    const LowLatencyDomain& ll = args.ll;
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (item.in_lines) {
        const uint8_t* row = lines_of(args, block, item.source, item.token);
        return await_step(ll, kKind, item.source, block.epoch, row, item.begin, lane, item.peeked);
    }
    const int64_t flag_at = ll.layout.dispatch_flag(set_of(block.epoch), item.source, item.token, item.piece);
    return sync::await_piece(ll, kKind, item.source, flag_at, block.epoch);
}

// What a token's first piece leaves beside its rows. False after a failure.
template <bool kBySource>
__device__ __forceinline__ bool note_token(const LowLatencyDispatchArgs& args, const BlockState& block,
                                           const Item& item, const Target& target) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (!kBySource && target.entry >= 0) args.src_info[target.row] = item.token;
    if (lane < args.num_topk) {
        const int64_t row = static_cast<int64_t>(item.source) * args.num_max_tokens + item.token;
        const int expert = target.entry < 0 ? -1 : entry_expert(target.entry);
        args.positions[row * args.num_topk + lane] =
            expert < 0 || kBySource ? expert : pack_position(expert, target.in_group);
    }
    if (kBySource && args.recv_stats != nullptr) count_token(args.recv_stats, target.entry);
    return args.weights == nullptr || keep_weights(args, block, item.source, item.token, target);
}

// Copies pieces to the rows of the experts that want them, or to their one row. Rows of a rank that is masked meanwhile are
// zeros, since ranges or positions count them. By all threads of a block; ends early after a failure.
//
// What is awaited comes in this order: headers, counts, a token's entries, its rows. A warp does what it can before each: the
// first own piece before the headers are there, looking where another's comes before the counts are, and all but placing it
// before the counts of other warps are.
template <bool kFp8, bool kBySource>
__device__ void receive_rows(const LowLatencyDispatchArgs& args, const DispatchPlan& plan, BlockState& block,
                             uint32_t* table) {
    enum class Heard { kNothing, kHeaders, kAll };
    const LowLatencyDomain& ll = args.ll;
    const RowShape& shape = plan.shape;
    const int num_ranks = ll.domain.num_ranks, lane = static_cast<int>(threadIdx.x % 32);
    const int num_local = plan.experts.count(ll.domain.rank);
    // Where ranks may be masked, nothing is known before all blocks agree on who takes part.
    const bool may_mask = ll.mask_after_ns != 0;
    const int num_early =
        plan.part == LowLatencyPart::kWhole && !may_mask ? args.num_tokens * plan.num_pieces() : 0;
    ItemWalk walk(plan, num_ranks, num_early);
    int number = walk.next(), num_items = num_early;
    Heard heard = Heard::kNothing;
    if (threadIdx.x / 32 == kHearingWarp) {
        if (await_headers(args, plan, block) && !may_mask) agree(args, plan, block);
        ptx::mbarrier_arrive(&block.heard);
    }
    bool is_open = false;
#pragma unroll 1
    while (true) {
        Item item{};
        if (number < num_items) {
            item = open_item(args, plan, block, shape, num_early, heard != Heard::kNothing, number);
            is_open = true;
        }
        Target target{};
        sync::Came came = sync::Came::kHere;
        int step = item.begin;
#pragma unroll 1
        do {
            RowStep what{};
            if (is_open && item.is_own) {
                const uint8_t* x = args.x + static_cast<int64_t>(item.token) * args.hidden * 2;
                what = encode<kFp8>(load_source<kFp8>(x, shape, step, lane), shape, step, args.format, lane);
            }
            if (step == item.begin) {
                if (heard == Heard::kNothing) {
                    heard = Heard::kHeaders;
                    if (may_mask) {
                        __syncthreads();
                        if (block.has_failed != 0 || !agree_with_counts<kBySource>(args, plan, block, table))
                            return;
                        walk =
                            ItemWalk(plan, num_ranks, num_ranks > 1 ? block.first_item[1] : block.num_items);
                        number = walk.next();
                    }
                    if (!kBySource) {
                        const bool is_good =
                            may_mask || await_counts(args, block, ~0u, num_local, plan.by_local, table);
                        arrive_with_counts(block, is_good);
                    }
                    if (!await_warps(block, block.heard)) return;
                    num_items = block.num_items;
                    if (!is_open && number < num_items) break;  // opened now
                }
                int32_t entry = -1;
                if (is_open) {
                    if (!await_entries(args, block, item.source, item.token, item.word, entry)) return;
                    if (!item.is_own && __ballot_sync(kAllLanes, entry >= 0) != 0)
                        came = await_item(args, block, item);
                    if (came == sync::Came::kFailed) return;
                }
                if (heard != Heard::kAll) {
                    if (!kBySource && !await_warps(block, block.counted)) return;
                    if (is_leader()) tell_places<kBySource>(args, block, num_local, table);
                    if (kBySource) clear_unused(args, block);
                    heard = Heard::kAll;
                }
                if (!is_open) return;
                target = place<kBySource>(args, block, item.source, item.token, entry, num_local, table);
                if (__ballot_sync(kAllLanes, entry >= 0) == 0) break;
            }
            if (!item.is_own && came == sync::Came::kHere) {
                // A step in lines is a piece of its own.
                const uint8_t* slot = ll.region[ll.domain.rank] +
                                      ll.layout.dispatch_slot(set_of(block.epoch), item.source, item.token);
                what = item.in_lines
                           ? item.peeked.step(lane)
                           : load_step(slot, reinterpret_cast<const uint32_t*>(slot + shape.num_bytes), shape,
                                       step, lane);
            }
            fan_out<kBySource>(args, shape, what, target, step);
        } while (++step < item.end);
        if (!is_open) continue;
        if (item.piece == 0 && !note_token<kBySource>(args, block, item, target)) return;
        number = walk.next();
        is_open = false;
    }
}

}  // namespace deep_ep::ll_dispatch
