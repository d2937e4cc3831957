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
constexpr int kBatch = 2;  // steps that a warp has in flight
constexpr int kScratchBytes = 44 << 10;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr auto kKind = LowLatencyKind::kDispatch;

// How the host cut the work.
struct DispatchPlan {
    LowLatencyPart part;
    RowPieces pieces;
    int chunk_words;  // words of 32 tokens that the scratch memory takes at a time
};

// What the threads of a block share.
struct BlockState {
    sync::LongestWaits waits;
    uint64_t epoch;
    unsigned room;  // ranks, as bits, whose set this operation may write
    // By turn: the sources from the own rank on. first_item: where the source's pieces begin among all of this rank.
    unsigned present;  // sources, as bits, that take part
    int num_items;
    int first_item[kMaxPeers];
    int num_tokens[kMaxPeers];
    int num_pieces[kMaxPeers];
    int piece_steps[kMaxPeers];
};

__device__ __forceinline__ int set_of(uint64_t epoch) {
    return static_cast<int>(epoch % kNumSets);
}

// Learns the operation's number, and waits for leave to write. By all threads of a block, once, before its first store.
__device__ void begin_block(const LowLatencyDispatchArgs& args, BlockState& block) {
    const LowLatencyDomain& ll = args.ll;
    if (threadIdx.x < 32) {
        const int peer = static_cast<int>(threadIdx.x);
        const uint64_t epoch = sync::next_epoch(ll, kKind);
        const bool may = peer < ll.domain.num_ranks &&
                         sync::await_room(ll, kKind, epoch, peer, block.waits) == sync::Came::kHere;
        const unsigned room = __ballot_sync(kAllLanes, may);
        if (peer == 0) {
            block.epoch = epoch;
            block.room = room;
        }
    }
    __syncthreads();
}

// The expert of a selection; -1 for none, and for one that does not exist.
template <class Index>
__device__ __forceinline__ int expert_at(const LowLatencyDispatchArgs& args, int64_t i) {
    const Index expert = static_cast<const Index*>(args.topk_idx)[i];
    return expert >= 0 && expert < args.num_experts ? static_cast<int>(expert) : -1;
}

// By one block: tells each peer the counts of its experts, and for each selection the number of the token among those for
// the same expert. The tokens of an expert are bits, so numbers follow the token order and a token that names an expert
// twice counts once. The block begins here, when it has counted.
template <class Index>
__device__ void announce(const LowLatencyDispatchArgs& args, const DispatchPlan& plan, BlockState& block,
                         uint32_t* scratch) {
    const LowLatencyDomain& ll = args.ll;
    const int num_ranks = ll.domain.num_ranks, num_experts = args.num_experts, num_topk = args.num_topk;
    const int thread = static_cast<int>(threadIdx.x);
    uint32_t* before = scratch;              // [num_experts]: tokens of earlier chunks
    uint32_t* bits = scratch + num_experts;  // [chunk_words, num_experts]
    for (int e = thread; e < num_experts; e += kNumThreads) before[e] = 0;
    const int chunk_tokens = 32 * plan.chunk_words;
    bool begun = false;
    for (int first = 0; first < args.num_tokens || !begun; first += chunk_tokens) {
        const int num_tokens = max(min(chunk_tokens, args.num_tokens - first), 0);
        const int num_words = (num_tokens + 31) / 32, num_selections = num_tokens * num_topk;
        const int64_t base = static_cast<int64_t>(first) * num_topk;
        for (int i = thread; i < num_words * num_experts; i += kNumThreads) bits[i] = 0;
        __syncthreads();
        for (int i = thread; i < num_selections; i += kNumThreads) {
            const int expert = expert_at<Index>(args, base + i), token = i / num_topk;
            if (expert >= 0) {
                atomicOr(&bits[token / 32 * num_experts + expert], 1u << token % 32);
            } else if (const Index given = static_cast<const Index*>(args.topk_idx)[base + i]; given != -1) {
                sync::report(ll.domain, DeviceError::kExpertRange, Operation::kDispatch, Phase::kLayout,
                             i % num_topk, first + token, static_cast<uint64_t>(given));
            }
        }
        __syncthreads();
        if (!begun) begin_block(args, block);
        begun = true;
        const int set = set_of(block.epoch);
        for (int i = thread; i < num_selections; i += kNumThreads) {
            const int expert = expert_at<Index>(args, base + i), token = i / num_topk;
            int owner = -1;
            int32_t entry = -1;
            if (expert >= 0) {
                owner = rank_of_expert(expert, num_experts, num_ranks);
                uint32_t ordinal = before[expert];
                for (int w = 0; w < token / 32; ++w) ordinal += __popc(bits[w * num_experts + expert]);
                ordinal += __popc(bits[token / 32 * num_experts + expert] & ((1u << token % 32) - 1));
                entry = pack_entry(expert - expert_range(num_experts, num_ranks, owner).first,
                                   static_cast<int>(ordinal));
            }
            for (unsigned left = block.room; left != 0; left &= left - 1) {
                const int peer = __ffs(left) - 1;
                auto* entries = reinterpret_cast<int32_t*>(ll.region[peer] +
                                                           ll.layout.dispatch_entries(set, ll.domain.rank));
                entries[base + i] = peer == owner ? entry : -1;
            }
        }
        __syncthreads();
        for (int e = thread; e < num_experts; e += kNumThreads) {
            for (int w = 0; w < num_words; ++w) before[e] += __popc(bits[w * num_experts + e]);
        }
        __syncthreads();
    }
    const int set = set_of(block.epoch);
    for (int e = thread; e < num_experts; e += kNumThreads) {
        const int owner = rank_of_expert(e, num_experts, num_ranks);
        if ((block.room >> owner & 1u) == 0) continue;
        auto* counts =
            reinterpret_cast<int32_t*>(ll.region[owner] + ll.layout.dispatch_counts(set, ll.domain.rank));
        counts[e - expert_range(num_experts, num_ranks, owner).first] = static_cast<int32_t>(before[e]);
    }
    __syncthreads();
    if (thread < num_ranks && (block.room >> thread & 1u) != 0) {
        LowLatencyHeader fields{};
        fields.signature = args.signature;
        fields.num_tokens = args.num_tokens;
        fields.num_pieces = plan.pieces.count;
        fields.piece_bytes = plan.pieces.bytes;
        sync::publish_header(ll, kKind, thread, block.epoch, fields);
    }
}

// The warps of the blocks from `first_block` on share the pieces of the tokens. begins: the block has yet to begin, and
// does so when each warp has its first piece at hand.
template <bool kFp8, class Index>
__device__ void send_rows(const LowLatencyDispatchArgs& args, const DispatchPlan& plan, BlockState& block,
                          int first_block, bool begins) {
    const LowLatencyDomain& ll = args.ll;
    const RowShape shape = RowShape::of(args.hidden, kFp8, args.format);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int num_blocks = static_cast<int>(gridDim.x) - first_block;
    const int num_pieces = plan.pieces.count, piece_steps = plan.pieces.bytes / kStepBytes;
    const int num_items = args.num_tokens * num_pieces;
    // In one launch the own tokens need not travel: the receiving half takes them from x.
    const unsigned not_own = plan.part == LowLatencyPart::kWhole ? ~(1u << ll.domain.rank) : ~0u;
    int item = static_cast<int>(blockIdx.x) - first_block + warp * num_blocks;
    int token = 0, piece = 0, step = 0, end = 0;
    unsigned to = 0;
    RowStep steps[kBatch];
    auto open = [&] {
        if (item >= num_items) return;
        token = item / num_pieces;
        piece = item - token * num_pieces;
        step = piece * piece_steps;
        end = min(step + piece_steps, shape.num_steps);
        const int expert = lane < args.num_topk
                               ? expert_at<Index>(args, static_cast<int64_t>(token) * args.num_topk + lane)
                               : -1;
        const unsigned bit =
            expert >= 0 ? 1u << rank_of_expert(expert, args.num_experts, ll.domain.num_ranks) : 0u;
        to = __reduce_or_sync(kAllLanes, bit) & not_own;
    };
    auto encode_batch = [&] {
        if (item >= num_items || to == 0) return;
        const uint8_t* x = args.x + static_cast<int64_t>(token) * args.hidden * 2;
        SourceStep<kFp8> sources[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            if (step + b < end) sources[b] = load_source<kFp8>(x, shape, step + b, lane);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            if (step + b < end) steps[b] = encode<kFp8>(sources[b], shape, step + b, args.format, lane);
        }
    };
    open();
    encode_batch();
    if (begins) begin_block(args, block);
    const unsigned room = block.room;
    const int set = set_of(block.epoch);
    while (item < num_items) {
        to &= room;
        for (unsigned left = to; left != 0; left &= left - 1) {
            const int peer = __ffs(left) - 1;
            uint8_t* slot = ll.region[peer] + ll.layout.dispatch_slot(set, ll.domain.rank, token);
            auto* scales = reinterpret_cast<uint32_t*>(slot + shape.num_bytes);
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                if (step + b < end) store_step(steps[b], slot, scales, 1, shape, step + b, lane);
            }
        }
        step += kBatch;
        if (step >= end || to == 0) {
            const int64_t flag_at = ll.layout.dispatch_flag(set, ll.domain.rank, token, piece);
            sync::publish_piece(ll, to, block.epoch, [&](int) { return flag_at; });
            item += num_blocks * kNumWarps;
            open();
        }
        encode_batch();
    }
}

// Waits for all sources and lays their pieces out behind one another. By all threads of a block; the same answer for all:
// false after a failure.
__device__ bool await_sources(const LowLatencyDispatchArgs& args, BlockState& block) {
    const LowLatencyDomain& ll = args.ll;
    const int num_ranks = ll.domain.num_ranks;
    bool is_good = true;
    if (threadIdx.x < 32) {
        const int turn = static_cast<int>(threadIdx.x);
        const int source = (ll.domain.rank + turn) % num_ranks;
        int num_tokens = 0, num_pieces = 1, piece_steps = 1;
        bool is_here = false;
        if (turn < num_ranks) {
            const sync::Came came =
                sync::await_header(ll, kKind, source, block.epoch, args.signature, block.waits);
            is_good = came != sync::Came::kFailed;
            is_here = came == sync::Came::kHere;
            if (is_here) {
                const LowLatencyHeader* header =
                    sync::header_at(ll, kKind, source, ll.domain.rank, block.epoch);
                // Within bounds whatever it says, as after a bug that a test planted.
                num_tokens = min(header->num_tokens, args.num_max_tokens);
                num_pieces = min(max(header->num_pieces, 1), kMaxRowPieces);
                piece_steps = max(header->piece_bytes / kStepBytes, 1);
            }
            block.num_tokens[source] = num_tokens;
            block.num_pieces[source] = num_pieces;
            block.piece_steps[source] = piece_steps;
        }
        const unsigned present = __reduce_or_sync(kAllLanes, is_here ? 1u << source : 0u);
        const int own = num_tokens * num_pieces;
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
    return __syncthreads_and(is_good) != 0;
}

__device__ __forceinline__ const int32_t* counts_from(const LowLatencyDispatchArgs& args, int set,
                                                      int source) {
    return reinterpret_cast<const int32_t*>(args.ll.region[args.ll.domain.rank] +
                                            args.ll.layout.dispatch_counts(set, source));
}

// What says where the rows lie: a thread an expert, the last blocks first, as block 0 comes late.
__device__ void write_ranges(const LowLatencyDispatchArgs& args, const BlockState& block, int set) {
    const int num_ranks = args.ll.domain.num_ranks;
    const int num_local = expert_range(args.num_experts, num_ranks, args.ll.domain.rank).count;
    const auto turn = static_cast<int>(gridDim.x - 1 - blockIdx.x);
    for (int e = turn * kNumThreads + static_cast<int>(threadIdx.x); e < num_local;
         e += static_cast<int>(gridDim.x) * kNumThreads) {
        int sum = 0;
        for (int source = 0; source < num_ranks; ++source) {
            const int count = (block.present >> source & 1u) != 0 ? counts_from(args, set, source)[e] : 0;
            args.layout_range[static_cast<int64_t>(e) * num_ranks + source] =
                static_cast<int64_t>(sum) << 32 | count;
            sum += count;
        }
        args.recv_count[e] = sum;
        if (args.recv_stats != nullptr) args.recv_stats[e] += sum;
    }
    if (turn == 0 && threadIdx.x < num_ranks) args.source_tokens[threadIdx.x] = block.num_tokens[threadIdx.x];
}

// Copies each piece that has come to the rows of the experts that want it. A warp a piece.
template <bool kFp8>
__device__ void receive_rows(const LowLatencyDispatchArgs& args, const DispatchPlan& plan,
                             BlockState& block) {
    const LowLatencyDomain& ll = args.ll;
    const RowShape shape = RowShape::of(args.hidden, kFp8, args.format);
    const int num_ranks = ll.domain.num_ranks, rank = ll.domain.rank, num_topk = args.num_topk;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int set = set_of(block.epoch);
    const int64_t capacity = static_cast<int64_t>(num_ranks) * args.num_max_tokens;
    const uint8_t* own = ll.region[rank];
    const int first_item = lane < num_ranks ? block.first_item[lane] : INT32_MAX;
    for (int item = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x); item < block.num_items;
         item += static_cast<int>(gridDim.x) * kNumWarps) {
        const int turn = __popc(__ballot_sync(kAllLanes, first_item <= item)) - 1;
        const int source = rank + turn < num_ranks ? rank + turn : rank + turn - num_ranks;
        const int index = item - __shfl_sync(kAllLanes, first_item, turn);
        const int token = index / block.num_pieces[source], piece = index % block.num_pieces[source];
        const auto* entries = reinterpret_cast<const int32_t*>(own + ll.layout.dispatch_entries(set, source));
        const int32_t entry = lane < num_topk ? entries[static_cast<int64_t>(token) * num_topk + lane] : -1;
        const unsigned wanted = __ballot_sync(kAllLanes, entry >= 0);
        int64_t row = -1;  // of this lane's selection, among the packed rows of all experts
        int in_expert = 0;
        if (entry >= 0) {
            in_expert = entry_ordinal(entry);
            for (unsigned left = block.present & ((1u << source) - 1); left != 0; left &= left - 1) {
                in_expert += counts_from(args, set, __ffs(left) - 1)[entry_expert(entry)];
            }
            row = entry_expert(entry) * capacity + in_expert;
        }
        const bool takes_own = source == rank && plan.part == LowLatencyPart::kWhole;
        sync::Came came = sync::Came::kHere;
        if (wanted != 0 && !takes_own) {
            came = sync::await_piece(ll, kKind, source, ll.layout.dispatch_flag(set, source, token, piece),
                                     block.epoch, block.waits);
            if (came == sync::Came::kFailed) return;
        }
        const int begin = piece * block.piece_steps[source];
        const int end = wanted == 0 ? begin : min(begin + block.piece_steps[source], shape.num_steps);
        const uint8_t* slot = own + ll.layout.dispatch_slot(set, source, token);
        const auto* slot_scales = reinterpret_cast<const uint32_t*>(slot + shape.num_bytes);
        const uint8_t* x = args.x + static_cast<int64_t>(token) * args.hidden * 2;
        for (int step = begin; step < end; step += kBatch) {
            RowStep steps[kBatch] = {};
            if (takes_own) {
                SourceStep<kFp8> sources[kBatch];
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    if (step + b < end) sources[b] = load_source<kFp8>(x, shape, step + b, lane);
                }
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    if (step + b < end)
                        steps[b] = encode<kFp8>(sources[b], shape, step + b, args.format, lane);
                }
            } else if (came == sync::Came::kHere) {
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    if (step + b < end) steps[b] = load_step(slot, slot_scales, shape, step + b, lane);
                }
            }  // else the rank was masked meanwhile: zeros, since the ranges count the row
            for (unsigned left = wanted; left != 0; left &= left - 1) {
                const int k = __ffs(left) - 1;
                const int64_t to = __shfl_sync(kAllLanes, row, k);
                const int64_t in_its_expert = __shfl_sync(kAllLanes, in_expert, k);
                const int64_t first_scale = (to - in_its_expert) * shape.scale_words + in_its_expert;
#pragma unroll
                for (int b = 0; b < kBatch; ++b) {
                    if (step + b >= end) continue;
                    store_step(steps[b], args.rows + to * shape.num_bytes, args.scales + first_scale,
                               capacity, shape, step + b, lane);
                }
            }
        }
        if (piece != 0) continue;
        if (entry >= 0) args.src_info[row] = token;
        if (lane < num_topk) {
            const int64_t at = (static_cast<int64_t>(source) * args.num_max_tokens + token) * num_topk + lane;
            args.positions[at] = entry < 0 ? -1 : pack_position(entry_expert(entry), in_expert);
        }
    }
}

// Block 0 announces, the others send; then all of them receive. No block waits for rows of its own grid; for the own
// header it waits for block 0, which has started before it.
template <bool kFp8, class Index>
__global__ void __launch_bounds__(kNumThreads, 1)
    low_latency_dispatch(const __grid_constant__ LowLatencyDispatchArgs args, const DispatchPlan plan) {
    extern __shared__ uint32_t scratch[];
    __shared__ BlockState block;
    if (threadIdx.x < kMaxPeers) block.waits.ns[threadIdx.x] = 0;
    ptx::wait_for_earlier_kernels();
    if (plan.part == LowLatencyPart::kReceive) {
        if (threadIdx.x == 0) block.epoch = *args.ticket;
        __syncthreads();
    } else {
        const bool alone = gridDim.x == 1;
        if (blockIdx.x == 0) announce<Index>(args, plan, block, scratch);
        if (blockIdx.x != 0 || alone) send_rows<kFp8, Index>(args, plan, block, alone ? 0 : 1, !alone);
    }
    if (plan.part == LowLatencyPart::kSend) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *args.ticket = block.epoch;
        sync::finish_send(args.ll, kKind, block.epoch);
        return;
    }
    if (await_sources(args, block)) {
        write_ranges(args, block, set_of(block.epoch));
        receive_rows<kFp8>(args, plan, block);
    }
    sync::finish_receive(args.ll, kKind, block.epoch, plan.part == LowLatencyPart::kWhole, block.waits,
                         args.wait_stats);
}

__global__ void __launch_bounds__(kMaxPeers)
    low_latency_dispatch_combine_refuse(const __grid_constant__ LowLatencyDomain ll, LowLatencyKind kind) {
    __shared__ sync::LongestWaits waits;
    const int peer = static_cast<int>(threadIdx.x);
    waits.ns[peer] = 0;
    __syncthreads();
    const uint64_t epoch = sync::next_epoch(ll, kind);
    if (peer < ll.domain.num_ranks && sync::await_room(ll, kind, epoch, peer, waits) == sync::Came::kHere) {
        LowLatencyHeader fields{};
        fields.signature = kRefusedSignature;
        sync::publish_header(ll, kind, peer, epoch, fields);
    }
    // What peers still send into this set lies there unread; they use it again in a later operation of their own.
    sync::finish_receive(ll, kind, epoch, true, waits, nullptr);
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

    // A row is cut as finely as there are warps for it, on the way out and on the way in.
    const int64_t num_warps = static_cast<int64_t>(num_sms) * kNumWarps;
    const RowPieces pieces =
        cut_row(shape.num_bytes, num_warps / std::max<int64_t>(num_ranks * num_tokens, 1));
    // Other ranks may send more tokens than this one does.
    const int64_t likely_tokens = std::max<int64_t>(num_tokens, (args.num_max_tokens + 3) / 4);
    const int64_t blocks = (likely_tokens * num_ranks * pieces.count + kNumWarps - 1) / kNumWarps;
    const int64_t num_blocks = std::clamp<int64_t>(blocks, std::min(num_sms, 2), num_sms);
    // Of the scratch memory one word an expert is for the sums.
    const int64_t most_words = kScratchBytes / 4 / std::max(args.num_experts, 1) - 1;
    const auto chunk_words =
        static_cast<int>(std::clamp<int64_t>((num_tokens + 31) / 32, 1, std::max<int64_t>(most_words, 1)));
    const size_t shared_bytes = sizeof(uint32_t) * args.num_experts * (1 + chunk_words);
    launch_early(kernel_of(args.use_fp8, args.topk_is_int64), static_cast<unsigned>(num_blocks), kNumThreads,
                 shared_bytes, static_cast<cudaStream_t>(stream), name, args,
                 DispatchPlan{part, pieces, chunk_words});
}

void launch_low_latency_refuse(const LowLatencyDomain& ll, LowLatencyKind kind, Stream stream) {
    low_latency_dispatch_combine_refuse<<<1, kMaxPeers, 0, static_cast<cudaStream_t>(stream)>>>(ll, kind);
    check_launch("low_latency_dispatch_combine_refuse");
}

}  // namespace deep_ep
