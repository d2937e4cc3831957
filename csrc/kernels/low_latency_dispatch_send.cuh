// Low-latency dispatch, the source of tokens: tells the peers what comes, and sends it.
#pragma once

#include "kernels/low_latency_dispatch.cuh"

namespace deep_ep::ll_dispatch {

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
template <bool kBySource>
__device__ __forceinline__ void send_entry(const LowLatencyDispatchArgs& args, const ExpertMap& experts,
                                           const BlockState& block, const Chunk& chunk, int expert, int token,
                                           int64_t i) {
    const LowLatencyDomain& ll = args.ll;
    int owner = -1;
    int32_t entry = -1;
    if (expert >= 0) {
        owner = experts.owner(expert);
        const uint32_t ordinal = kBySource ? 0 : chunk.ordinal(expert, token);
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
__device__ __forceinline__ int64_t kept_at(const int64_t (&kept)[kKept], int j) {
    static_assert(kKept == 2);
    return j == 0 ? kept[0] : kept[1];
}

// By one block: tells each peer the counts of its experts, and for each selection the number of the token among those for the
// same expert. Where rows lie by source nothing has to be counted.
template <bool kBySource>
__device__ void announce(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                         const BlockState& block, uint32_t* scratch) {
    const int num_experts = args.num_experts, num_topk = args.num_topk,
              thread = static_cast<int>(threadIdx.x);
    const Chunk chunk{num_experts, scratch, scratch + num_experts};
    const int num_counted = kBySource ? 0 : num_experts;
    const int chunk_tokens = 32 * plan.chunk_words;
#pragma unroll 1
    for (int first = 0; first == 0 || first < args.num_tokens; first += chunk_tokens) {
        const int num_tokens = min(chunk_tokens, args.num_tokens - first), num_words = (num_tokens + 31) / 32;
        const int64_t base = static_cast<int64_t>(first) * num_topk;
        const int num_selections = num_tokens * num_topk;
        int64_t kept[kKept];
#pragma unroll
        for (int j = 0; j < kKept; ++j) {
            const int i = thread + j * kNumThreads;
            kept[j] = i < num_selections ? selection(args, base + i) : -1;
        }
#pragma unroll 1
        for (int i = thread; i < num_words * num_counted; i += kNumThreads) chunk.bits[i] = 0;
        if (first == 0) {
#pragma unroll 1
            for (int e = thread; e < num_counted; e += kNumThreads) chunk.before[e] = 0;
        }
        __syncthreads();
        int bad = -1;
#pragma unroll 1
        for (int i = thread, j = 0; i < num_selections; i += kNumThreads, ++j) {
            const int64_t given = j < kKept ? kept_at(kept, j) : selection(args, base + i);
            const int expert = existing(args, given);
            if (expert >= 0 && !kBySource) chunk.add(expert, plan.by_topk.quotient(i));
            if (expert < 0 && given != -1) bad = i;
        }
        if (bad >= 0) {
            sync::report_apart(args.ll.domain, DeviceError::kExpertRange, Operation::kLowLatencyDispatch,
                               Phase::kLayout, plan.by_topk.remainder(bad),
                               first + plan.by_topk.quotient(bad),
                               static_cast<uint64_t>(selection(args, base + bad)));
        }
        __syncthreads();
        const bool is_last = first + chunk_tokens >= args.num_tokens;
        if (is_last && !kBySource) send_counts(args, plan.experts, block, chunk, num_words);
#pragma unroll 1
        for (int i = thread, j = 0; i < num_selections; i += kNumThreads, ++j) {
            const int64_t given = j < kKept ? kept_at(kept, j) : selection(args, base + i);
            send_entry<kBySource>(args, plan.experts, block, chunk, existing(args, given),
                                  plan.by_topk.quotient(i), base + i);
        }
        if (is_last) return;
        __syncthreads();
#pragma unroll 1
        for (int e = thread; e < num_counted; e += kNumThreads) chunk.before[e] = chunk.count(e, num_words);
        __syncthreads();
    }
}

// The warps of `num_blocks` blocks from `first_block` on share the pieces of the tokens. begins: the block has yet to meet
// its first warp, and does so when each warp has its first piece on the way.
template <bool kFp8>
__device__ void send_rows(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                          const BlockState& block, int first_block, int num_blocks, bool begins) {
    const LowLatencyDomain& ll = args.ll;
    const RowShape& shape = plan.shape;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    // The first warp, which begins, sends last.
    const int turn = (warp + kNumWarps - 1) % kNumWarps;
    const int num_pieces = plan.num_pieces(), piece_steps = plan.piece_steps();
    // In one launch the own tokens need not travel: the receiving half takes them from x.
    const unsigned not_own = plan.part == LowLatencyPart::kWhole ? ~(1u << ll.domain.rank) : ~0u;
    const bool travels = ll.domain.num_ranks > 1 || plan.part != LowLatencyPart::kWhole;
    const int index = static_cast<int>(blockIdx.x) - first_block;
    const int num_items = travels && index < num_blocks ? args.num_tokens * num_pieces : 0;
    int item = index + turn * num_blocks;
    int token = 0, piece = 0, step = 0, end = 0;
    unsigned to = 0;
    int64_t given = -1;
    SourceStep<kFp8> source;
    auto open = [&] {
        if (item >= num_items) return;
        token = plan.by_pieces.quotient(item);
        piece = item - token * num_pieces;
        step = piece * piece_steps;
        end = min(step + piece_steps, shape.num_steps);
        given =
            lane < args.num_topk ? selection(args, static_cast<int64_t>(token) * args.num_topk + lane) : -1;
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
    if (begins) __syncthreads();
    close();
    const uint64_t epoch = block.epoch;
    const unsigned room = block.room;
    const int set = set_of(epoch);
#pragma unroll 1
    while (item < num_items) {
        to &= room;
        const int64_t line_at = plan.in_lines ? ll.layout.dispatch_lines(set, ll.domain.rank, token) : 0;
        const RowStep what = encode<kFp8>(source, shape, step, args.format, lane);
#pragma unroll 1
        for (unsigned left = to; left != 0; left &= left - 1) {
            uint8_t* region = ll.region[__ffs(left) - 1];
            if (plan.in_lines) {
                send_step(what, region + line_at, step, epoch, lane);
            } else {
                uint8_t* slot = region + ll.layout.dispatch_slot(set, ll.domain.rank, token);
                auto* scales = reinterpret_cast<uint32_t*>(slot + shape.num_bytes);
                store_step(what, slot, scales, 1, shape, step, lane);
            }
        }
        const bool is_done = ++step >= end || to == 0;
        if (is_done) {
            if (!plan.in_lines && to != 0) {
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

}  // namespace deep_ep::ll_dispatch
