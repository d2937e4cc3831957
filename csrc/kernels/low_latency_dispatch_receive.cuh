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
__device__ __forceinline__ void take_header(const LowLatencyDispatchArgs& args, const RowShape& shape,
                                            const LowLatencyHeader& header, int source, BlockState& block) {
    const bool in_lines = header.num_pieces == 0;
    const int most =
        in_lines ? min(args.ll.layout.dispatch_line_tokens, args.num_max_tokens) : args.num_max_tokens;
    block.num_tokens[source] = min(max(header.num_tokens, 0), most);
    block.num_pieces[source] = in_lines ? shape.num_steps : min(header.num_pieces, kMaxRowPieces);
    block.by_pieces[source] = SmallDivider::of(block.num_pieces[source]);
    block.piece_steps[source] = in_lines ? 1 : max(header.piece_steps, 1);
    if (in_lines) atomicOr(&block.in_lines, 1u << source);
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
template <bool kBySource>
__device__ void place_rows(const LowLatencyDispatchArgs& args, const BlockState& block, int num_local,
                           uint32_t* table) {
    const int num_ranks = args.ll.domain.num_ranks, num_placed = kBySource ? 0 : num_local;
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

// Waits for what all sources tell of their tokens. By all threads of a block. table [num_ranks, num_local]: how many tokens of
// a source want an expert. The same answer for all: false after a failure.
template <bool kBySource>
__device__ bool await_sources(const LowLatencyDispatchArgs& args, BlockState& block, int num_local,
                              const SmallDivider& by_local, uint32_t* table) {
    const RowShape shape = RowShape::of(args.hidden, args.use_fp8, args.format);
    bool is_good = true;
    if (threadIdx.x < 32) is_good = await_headers(args, shape, block) != sync::Came::kFailed;
    if (!kBySource) is_good = await_counts(args, block, ~0u, num_local, by_local, table) && is_good;
    if (__syncthreads_and(is_good) == 0) return false;
    if (threadIdx.x < 32) agree(args, shape, block);
    __syncthreads();
    const unsigned again = block.present & block.absent;
    if (!kBySource && again != 0) {
        // All have read it before it changes.
        __syncthreads();
        if (threadIdx.x == 0) block.absent = 0;
        __syncthreads();
        is_good = await_counts(args, block, again, num_local, by_local, table);
        if (__syncthreads_and(is_good) == 0) return false;
    }
    return true;
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

// Waits for the entries of a token, one a lane; none if the source was masked meanwhile. False after a failure.
template <bool kBySource>
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
        if (!kBySource) {
            group = entry_expert(target.entry);
            target.in_group =
                static_cast<int>(table[source * num_local + group]) + entry_ordinal(target.entry);
        }
        target.row = group * group_rows<kBySource>(args) + target.in_group;
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
template <bool kBySource>
__device__ __forceinline__ void fan_out(const LowLatencyDispatchArgs& args, const RowShape& shape,
                                        const RowStep& what, const Target& target, int step) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t capacity = group_rows<kBySource>(args);
    unsigned left = __ballot_sync(kAllLanes, target.entry >= 0);
    if (kBySource) left &= 0u - left;
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

// The pieces that a warp deals with, one after the other. The own ones come first; blocks that send nothing, if there are any,
// do these alone.
struct ItemWalk {
    int apart, num_apart, apart_stride;
    int shared, num_items, shared_stride;

    __device__ __forceinline__ ItemWalk(const DispatchPlan& plan, const BlockState& block, int num_ranks) {
        const int num_blocks = static_cast<int>(gridDim.x), index = static_cast<int>(blockIdx.x);
        const int warp = static_cast<int>(threadIdx.x / 32);
        const int num_idle = num_blocks - 1 - plan.num_senders, idle_index = index - 1 - plan.num_senders;
        num_apart = num_idle > 0 && num_ranks > 1 ? block.first_item[1] : 0;
        apart = idle_index >= 0 ? idle_index + warp * num_idle : num_apart;
        apart_stride = num_idle * kNumWarps;
        shared = num_apart + index + warp * num_blocks;
        shared_stride = num_blocks * kNumWarps;
        num_items = block.num_items;
    }
    // The next one, below 0 after the last.
    __device__ __forceinline__ int next() {
        const bool is_apart = apart < num_apart;
        int item = is_apart ? apart : shared;
        if (item >= num_items) item = -1;
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

// By all lanes of a warp. first_item: of the turn that is the lane's, INT32_MAX beyond them.
__device__ __forceinline__ Item open_item(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                                          const BlockState& block, const RowShape& shape, int first_item,
                                          int number) {
    const LowLatencyDomain& ll = args.ll;
    const int lane = static_cast<int>(threadIdx.x % 32), set = set_of(block.epoch);
    const int turn = __popc(__ballot_sync(kAllLanes, first_item <= number)) - 1;
    const int index = number - __shfl_sync(kAllLanes, first_item, turn);
    Item item{};
    item.source = source_of(ll.domain, turn);
    item.token = block.by_pieces[item.source].quotient(index);
    item.piece = index - item.token * block.num_pieces[item.source];
    item.is_own = item.source == ll.domain.rank && plan.part == LowLatencyPart::kWhole;
    item.in_lines = !item.is_own && (block.in_lines >> item.source & 1u) != 0;
    item.begin = item.piece * block.piece_steps[item.source];
    item.end = min(item.begin + block.piece_steps[item.source], shape.num_steps);
    const uint8_t* own = ll.region[ll.domain.rank];
    if (lane < args.num_topk) {
        item.word = sync::peek_word(own + ll.layout.dispatch_entries(set, item.source) +
                                    (static_cast<int64_t>(item.token) * args.num_topk + lane) * 8);
    }
    if (item.in_lines) {
        item.peeked =
            peek_step(own + ll.layout.dispatch_lines(set, item.source, item.token), item.begin, lane);
    }
    return item;
}

// Copies a piece to the rows of the experts that want it, or to its one row. Rows of a rank that is masked meanwhile are zeros,
// since ranges or positions count them. False after a failure.
template <bool kFp8, bool kBySource>
__device__ __forceinline__ bool receive_item(const LowLatencyDispatchArgs& args, const BlockState& block,
                                             const RowShape& shape, Item& item, int num_local,
                                             const uint32_t* table) {
    const LowLatencyDomain& ll = args.ll;
    const int lane = static_cast<int>(threadIdx.x % 32), set = set_of(block.epoch);
    const int source = item.source, token = item.token, num_topk = args.num_topk;
    const uint8_t* own = ll.region[ll.domain.rank];
    const uint8_t* line_row = own + ll.layout.dispatch_lines(set, source, item.in_lines ? token : 0);
    const uint8_t* slot = own + ll.layout.dispatch_slot(set, source, token);
    Target target;
    sync::Came came = sync::Came::kHere;
#pragma unroll 1
    for (int step = item.begin; step < item.end; ++step) {
        RowStep what{};
        if (item.is_own) {
            const uint8_t* x = args.x + static_cast<int64_t>(token) * args.hidden * 2;
            what = encode<kFp8>(load_source<kFp8>(x, shape, step, lane), shape, step, args.format, lane);
        }
        if (step == item.begin) {
            if (!await_entries<kBySource>(args, block, source, token, item.word, num_local, table, target))
                return false;
            if (__ballot_sync(kAllLanes, target.entry >= 0) == 0) break;
            if (item.in_lines) {
                came = await_step(ll, kKind, source, block.epoch, line_row, step, lane, item.peeked);
            } else if (!item.is_own) {
                came = sync::await_piece(
                    ll, kKind, source, ll.layout.dispatch_flag(set, source, token, item.piece), block.epoch);
            }
            if (came == sync::Came::kFailed) return false;
        }
        if (!item.is_own && came == sync::Came::kHere) {
            what = item.in_lines ? item.peeked.step(lane)
                                 : load_step(slot, reinterpret_cast<const uint32_t*>(slot + shape.num_bytes),
                                             shape, step, lane);
        }
        fan_out<kBySource>(args, shape, what, target, step);
    }
    if (item.piece != 0) return true;
    if (!kBySource && target.entry >= 0) args.src_info[target.row] = token;
    if (lane < num_topk) {
        const int64_t at = (static_cast<int64_t>(source) * args.num_max_tokens + token) * num_topk + lane;
        const int expert = target.entry < 0 ? -1 : entry_expert(target.entry);
        args.positions[at] = expert < 0 || kBySource ? expert : pack_position(expert, target.in_group);
    }
    if (kBySource && args.recv_stats != nullptr) count_token(args.recv_stats, target.entry);
    return args.weights == nullptr || keep_weights(args, block, source, token, target);
}

// By all threads of a block, after await_sources(): decides where rows lie, and copies those that come. Each warp's first piece
// is looked at before it is known where it goes.
template <bool kFp8, bool kBySource>
__device__ void receive_rows(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                             const BlockState& block, int num_local, uint32_t* table) {
    const RowShape shape = RowShape::of(args.hidden, kFp8, args.format);
    const int num_ranks = args.ll.domain.num_ranks, lane = static_cast<int>(threadIdx.x % 32);
    const int first_item = lane < num_ranks ? block.first_item[lane] : INT32_MAX;
    ItemWalk walk(plan, block, num_ranks);
    bool is_placed = false;
#pragma unroll 1
    for (int number = walk.next();; number = walk.next()) {
        Item item{};
        if (number >= 0) item = open_item(args, plan, block, shape, first_item, number);
        if (!is_placed) {
            place_rows<kBySource>(args, block, num_local, table);
            if (kBySource) clear_unused(args, block);
            __syncthreads();
            is_placed = true;
        }
        if (number < 0) return;
        if (!receive_item<kFp8, kBySource>(args, block, shape, item, num_local, table)) return;
    }
}

}  // namespace deep_ep::ll_dispatch
