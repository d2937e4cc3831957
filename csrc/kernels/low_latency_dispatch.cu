#include <algorithm>

#include "kernels/low_latency_dispatch_receive.cuh"
#include "kernels/low_latency_dispatch_send.cuh"
#include "ptx/grid.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"

namespace deep_ep {
namespace {

using namespace ll_dispatch;

// Block 0 announces, the others send; then all of them receive. No block waits for rows of its own grid; for what block 0
// announces it waits, and block 0 has started before it.
template <bool kFp8, bool kBySource>
__global__ void __launch_bounds__(kNumThreads, 1)
    low_latency_dispatch(const __grid_constant__ LowLatencyDispatchArgs args,
                         const __grid_constant__ DispatchPlan plan) {
    extern __shared__ uint32_t scratch[];
    __shared__ BlockState block;
    const LowLatencyDomain& ll = args.ll;
    const bool begins = plan.part != LowLatencyPart::kReceive;
    if (threadIdx.x == 0) block.clear();
    uint64_t epoch = 0;  // known to the first thread
    if (begins && threadIdx.x == 0) epoch = sync::begin_operation(ll, kKind);
    // Before the kernels ahead have ended, or after that.
    bool has_begun = !begins || threadIdx.x >= 32;
#pragma unroll 1
    for (int attempt = ll.mask_after_ns == 0 ? 0 : 1; attempt < 2; ++attempt) {
        if (attempt == 1) ptx::wait_for_earlier_kernels();
        if (!has_begun) has_begun = begin_block(args, plan, epoch, attempt == 0, block);
    }
    // The next kernel may begin when all blocks of this one have.
    if (plan.overlaps && threadIdx.x == 0) ptx::launch_dependents();
    if (is_leader() && threadIdx.x / 32 == kHearingWarp) sync::tell_consumed(ll, kKind);
    if (!begins) {
        if (threadIdx.x == 0) block.epoch = *args.ticket;
        __syncthreads();
    } else {
        const bool alone = gridDim.x == 1;
        if (blockIdx.x == 0) announce<kBySource>(args, plan, block, scratch);
        if (blockIdx.x != 0 || alone)
            send_rows<kFp8>(args, plan, block, alone ? 0 : 1, plan.num_senders, !alone);
    }
    if (plan.part == LowLatencyPart::kSend) {
        if (blockIdx.x == 0 && threadIdx.x == 0) *args.ticket = block.epoch;
        return;
    }
    // The scratch memory changes hands.
    if (blockIdx.x == 0) __syncthreads();
    receive_rows<kFp8, kBySource>(args, plan, block, scratch);
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

Kernel kernel_of(bool use_fp8, bool expert_major) {
    if (use_fp8) return expert_major ? low_latency_dispatch<true, false> : low_latency_dispatch<true, true>;
    return expert_major ? low_latency_dispatch<false, false> : low_latency_dispatch<false, true>;
}

}  // namespace

void prepare_low_latency_dispatch() {
    for (const bool use_fp8 : {false, true}) {
        for (const bool expert_major : {false, true})
            load_kernel(kernel_of(use_fp8, expert_major), "low_latency_dispatch");
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

    const bool in_lines = num_tokens <= args.ll.layout.dispatch_line_tokens;
    if (in_lines)
        check_limit(shape.num_steps * kLineStepBytes, args.ll.layout.line_row_bytes, name, "a row in lines");
    // A piece is as short as leaves one for each warp, on the way out and on the way in. The far end begins when a piece is
    // whole, so it is not long either, unless the row has more than kMaxRowPieces of these.
    constexpr int kMostPieceSteps = 4;
    const int64_t num_warps = static_cast<int64_t>(num_sms) * kNumWarps;
    const int64_t pieces_wanted =
        std::max<int64_t>(num_warps / std::max<int64_t>(num_ranks * num_tokens, 1),
                          (shape.num_steps + kMostPieceSteps - 1) / kMostPieceSteps);
    const RowPieces pieces = cut_row(shape.num_bytes, pieces_wanted);
    // Other ranks may send more tokens than this one does.
    const int64_t likely_tokens = std::max<int64_t>(num_tokens, (args.num_max_tokens + 3) / 4);
    const int64_t likely_items = likely_tokens * num_ranks * (in_lines ? shape.num_steps : pieces.count);
    const int64_t blocks = (likely_items + kItemsPerBlock - 1) / kItemsPerBlock + 2;
    const int64_t num_blocks = std::clamp<int64_t>(blocks, std::min(num_sms, 2), num_sms);
    // Where rows keep the link busy for long, half of the blocks deal with the own ones meanwhile.
    const bool shares =
        num_tokens > kShortTokens && part == LowLatencyPart::kWhole && num_ranks > 1 && num_blocks > 2;
    const auto num_senders = static_cast<int>(shares ? num_blocks / 2 : std::max<int64_t>(num_blocks - 1, 1));
    const bool spares = !shares && likely_items <= (num_blocks - 2) * kNumWarps;
    const int first_receiver = spares ? 1 : 0;
    const auto num_receivers = static_cast<int>(spares ? num_blocks - 2 : num_blocks);
    // Of the scratch memory one word an expert is for the sums; later it takes the counts of all sources.
    const int64_t most_words = kScratchBytes / 4 / std::max(args.num_experts, 1) - 1;
    const auto chunk_words =
        static_cast<int>(std::clamp<int64_t>((num_tokens + 31) / 32, 1, std::max<int64_t>(most_words, 1)));
    const ExpertMap experts = ExpertMap::of(args.num_experts, static_cast<int>(num_ranks));
    const int num_local = experts.count(args.ll.domain.rank);
    const int64_t num_words =
        std::max<int64_t>(static_cast<int64_t>(args.num_experts) * (1 + chunk_words), num_ranks * num_local);
    const size_t shared_bytes = args.expert_major ? sizeof(uint32_t) * num_words : 0;
    launch_early(
        kernel_of(args.use_fp8, args.expert_major), static_cast<unsigned>(num_blocks), kNumThreads,
        shared_bytes, static_cast<cudaStream_t>(stream), name, args,
        DispatchPlan{part, may_overlap(args.ll.domain, num_sms), in_lines, pieces, num_senders,
                     first_receiver, num_receivers, chunk_words, experts, SmallDivider::of(args.num_topk),
                     SmallDivider::of(in_lines ? shape.num_steps : pieces.count),
                     SmallDivider::of(std::max(num_local, 1)), shape});
}

void launch_low_latency_refuse(const LowLatencyDomain& ll, LowLatencyKind kind, Stream stream) {
    low_latency_dispatch_combine_refuse<<<1, kMaxPeers, 0, static_cast<cudaStream_t>(stream)>>>(ll, kind);
    check_launch("low_latency_dispatch_combine_refuse");
}

}  // namespace deep_ep
