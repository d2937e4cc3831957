#include <algorithm>
#include <stdexcept>

#include "kernels/low_latency_combine_send.cuh"
#include "kernels/low_latency_combine_sum.cuh"
#include "ptx/grid.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"

namespace deep_ep {
namespace {

using namespace ll_combine;

// Waits for leave to write, and in block 0 of a home tells each rank how many tokens it has. By the first warp of every block,
// whose first thread knows the epoch; the others know after a block barrier. early, and the result: as in dispatch.
__device__ __forceinline__ bool begin_block(const LowLatencyCombineArgs& args, const CombinePlan& plan,
                                            const Run& op, uint64_t epoch, bool early, Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    const int peer = static_cast<int>(threadIdx.x);
    epoch = __shfl_sync(kAllLanes, epoch, 0);
    sync::Room room{};
    if (!sync::peek_rooms(ll, kKind, epoch, early, room) && early) return false;
    if (peer < ll.domain.num_ranks) {
        const sync::Came came = sync::await_room(ll, kKind, epoch, peer, room);
        if (op.begins && blockIdx.x == 0 && peer != ll.domain.rank && came == sync::Came::kHere) {
            sync::publish_header(ll, kKind, peer, epoch,
                                 {signature_tag(args.signature), args.num_tokens,
                                  plan.in_lines ? 0 : plan.cut.count, plan.cut.bytes / kStepBytes});
        }
        peers.came[peer] = came;
        peers.waited_ns[peer] = 0;
    }
    if (peer == 0) {
        peers.epoch = epoch;
        peers.apart_under_way = 0;
    }
    return true;
}

// By all threads of a block, once its first warp has begun.
__device__ __forceinline__ void take_epoch(Run& op, const Peers& peers) {
    __syncthreads();
    op.epoch = peers.epoch;
    op.set = static_cast<int>(op.epoch % kNumSets);
}

// By one block of a home: tells each rank which of its experts a token selected, and the weights.
__device__ void send_selections(const LowLatencyCombineArgs& args, const CombinePlan& plan, Run& op,
                                const Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    const int num_ranks = ll.domain.num_ranks, rank = ll.domain.rank;
    const int count = args.num_tokens * args.num_topk, stride = static_cast<int>(blockDim.x);
    int i = static_cast<int>(threadIdx.x);
    // Loaded one ahead, and the first before anything is waited for.
    int64_t next_expert = i < count ? selection(args, i) : -1;
    float next_weight = i < count && !op.knows_weights ? args.topk_weights[i] : 0.0f;
    take_epoch(op, peers);
    if (op.knows_weights) return;
#pragma unroll 1
    for (; i < count; i += stride) {
        const int64_t given = next_expert;
        const float weight = next_weight;
        if (i + stride < count) {
            next_expert = selection(args, i + stride);
            next_weight = args.topk_weights[i + stride];
        }
        const int expert = existing(args, given);
        if (expert < 0 && given != -1) {
            sync::report_apart(ll.domain, DeviceError::kExpertRange, Operation::kLowLatencyCombine,
                               Phase::kLayout, plan.by_topk.remainder(i), plan.by_topk.quotient(i),
                               static_cast<uint64_t>(given));
        }
        const int owner = expert < 0 ? -1 : plan.experts.owner(expert);
        const int local = expert < 0 ? -1 : expert - plan.experts.first(owner);
        const int64_t at =
            ll.layout.combine_selections(op.set, rank) + static_cast<int64_t>(i) * kPacketBytes;
#pragma unroll 1
        for (int to = 0; to < num_ranks; ++to) {
            if (to == rank || peers.came[to] != sync::Came::kHere) continue;
            sync::send_packet(ll.region[to] + at, op.epoch, static_cast<uint32_t>(to == owner ? local : -1),
                              __float_as_uint(weight), 0);
        }
    }
}

// Learns what each rank wants back, or, in the send part, only what may be sent there. By all threads of a block.
__device__ void meet_peers(const LowLatencyCombineArgs& args, const CombinePlan& plan, const Run& op,
                           Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    const int peer = static_cast<int>(threadIdx.x), rank = ll.domain.rank;
    if (peer < ll.domain.num_ranks) {
        sync::Came came = peers.came[peer];
        // On its way while headers are waited for.
        const int noted = args.source_tokens != nullptr ? args.source_tokens[peer] : args.num_max_tokens;
        bool in_lines = op.sends_early && plan.in_lines;
        RowPieces cut = plan.cut;
        int num_tokens = 0;
        if (op.ends && !op.sends_early && peer != rank && came != sync::Came::kFailed) {
            LowLatencyHeader header{};
            if (came == sync::Came::kHere) {
                came = sync::await_header(ll, kKind, peer, op.epoch, args.signature, header,
                                          &peers.waited_ns[peer]);
            }
            if (came != sync::Came::kFailed &&
                sync::decide(ll, kKind, op.epoch, peer, came == sync::Came::kHere)) {
                if (came != sync::Came::kHere) header = sync::read_header(ll, kKind, peer, op.epoch);
                came = sync::Came::kHere;
                // Within bounds whatever it says, as after a bug that a test planted.
                in_lines = header.num_pieces == 0;
                num_tokens = min(
                    max(header.num_tokens, 0),
                    in_lines ? min(ll.layout.combine_line_tokens, args.num_max_tokens) : args.num_max_tokens);
                cut = in_lines ? by_steps(args.hidden)
                               : RowPieces{min(header.num_pieces, kMaxRowPieces),
                                           max(header.piece_steps, 1) * kStepBytes};
            } else if (came == sync::Came::kHere) {
                came = sync::Came::kMasked;
            }
        }
        const int num_placed = args.positions != nullptr ? min(noted, args.num_max_tokens) : 0;
        peers.num_placed[peer] = num_placed;
        peers.num_tokens[peer] = op.sends_early ? num_placed : num_tokens;
        peers.in_lines[peer] = in_lines;
        peers.cut[peer] = cut;
        // Mostly as this rank cuts: a division takes longer than all the rest.
        const bool is_alike = cut.count == plan.by_pieces.divisor;
        peers.by_pieces[peer] = is_alike ? plan.by_pieces : SmallDivider::of(cut.count);
        peers.came[peer] = came;
    }
    __syncthreads();
}

// By one warp where rows leave before their homes were heard: hears them all the same, to notice one that is in another
// operation, or that refused.
__device__ __forceinline__ void watch_peers(const LowLatencyCombineArgs& args, const Run& op, Peers& peers) {
    const int peer = static_cast<int>(threadIdx.x % 32);
    if (peer < args.ll.domain.num_ranks && peer != args.ll.domain.rank &&
        peers.came[peer] == sync::Came::kHere) {
        LowLatencyHeader header{};
        sync::await_header(args.ll, kKind, peer, op.epoch, args.signature, header, &peers.waited_ns[peer]);
    }
    __syncwarp();
}

// Of a block: more of them the more of the tokens' rows lie with their own rank.
__device__ __forceinline__ int own_warps(int num_ranks) {
    return num_ranks == 1 ? 0 : max(kNumWarps / num_ranks, 2);
}

// A rank sums what its own experts made of a token before it sends one row. For that it needs the weights, which come from the
// token's home; where rows are sent before anything may be awaited they are not always there (kSumsInTime). Rows by source are
// sums already.
template <Form kForm, bool kBySource>
__global__ void __launch_bounds__(kNumThreads, 1)
    low_latency_combine(const __grid_constant__ LowLatencyCombineArgs args,
                        const __grid_constant__ CombinePlan plan) {
    __shared__ Peers peers;
    const LowLatencyDomain& ll = args.ll;
    Run op{};
    op.begins = plan.part != LowLatencyPart::kReceive;
    uint64_t epoch = 0;
    if (op.begins && threadIdx.x == 0) epoch = sync::begin_operation(ll, kKind);
    // Before the kernels ahead have ended, or after that.
    bool has_begun = threadIdx.x >= 32;
#pragma unroll 1
    for (int attempt = op.begins && ll.mask_after_ns == 0 ? 0 : 1; attempt < 2; ++attempt) {
        if (attempt == 1) ptx::wait_for_earlier_kernels();
        if (!op.begins && threadIdx.x == 0) epoch = *args.ticket;
        if (!has_begun) has_begun = begin_block(args, plan, op, epoch, attempt == 0, peers);
    }
    // The next kernel may begin when all blocks of this one have.
    if (plan.overlaps && threadIdx.x == 0) ptx::launch_dependents();
    const bool has_positions = args.positions != nullptr;
    op.ends = plan.part != LowLatencyPart::kSend;
    op.in_lines = plan.in_lines;
    op.knows_weights = kBySource || (kForm == Form::kSums && args.weights != nullptr);
    op.sends_early = op.knows_weights || (plan.part == LowLatencyPart::kSend && has_positions);
    op.own_by_slot = plan.part != LowLatencyPart::kWhole && has_positions;
    op.num_local = plan.experts.count(ll.domain.rank);
    const int warp = static_cast<int>(threadIdx.x / 32), num_blocks = static_cast<int>(gridDim.x);
    // By another warp than the one that begins.
    const bool watches = is_leader() && warp == kNumWarps - 1;
    if (watches) sync::tell_consumed(ll, kKind);
    if (op.begins && blockIdx.x == 0) {
        send_selections(args, plan, op, peers);
        if (plan.part == LowLatencyPart::kSend && threadIdx.x == 0) *args.ticket = op.epoch;
    } else {
        take_epoch(op, peers);
    }
    if (op.ends || op.sends_early) meet_peers(args, plan, op, peers);
    if (watches && op.ends && op.sends_early) watch_peers(args, op, peers);
    // Without positions only the homes can tell which row is whose k-th, so the rows leave in the receive part.
    const bool sends_here =
        plan.part == LowLatencyPart::kReceive ? !has_positions : op.ends || op.sends_early;
    // Where rows keep the link busy for long, some warps sum own tokens meanwhile, and the warps of a block take pieces of the
    // same tokens, so that it touches few pages. Else all send first, and the jobs of the sums go to the warps that are free.
    const int num_own_warps = sends_here && op.ends && plan.is_long ? own_warps(ll.domain.num_ranks) : 0;
    const bool is_own = warp < num_own_warps;
    const int num_warps = is_own ? num_own_warps : kNumWarps - num_own_warps;
    const int index = is_own ? warp : warp - num_own_warps, block = static_cast<int>(blockIdx.x);
    Workers workers{};
    workers.index = plan.is_long ? block * num_warps + index : block + index * num_blocks;
    workers.count = num_warps * num_blocks;
    if (sends_here && !is_own) workers.index = serve_homes<kForm, kBySource>(args, plan, op, peers, workers);
    if (!op.ends) return;
    if (is_own || num_own_warps == 0) serve_own_tokens<kForm, kBySource>(args, plan, op, peers, workers);
    if (!is_leader()) return;
    __syncthreads();
    if (threadIdx.x == 0) sync::note_received(ll, kKind, op.epoch);
    if (threadIdx.x < ll.domain.num_ranks) {
        sync::keep_wait(ll, kKind, static_cast<int>(threadIdx.x), peers.waited_ns[threadIdx.x],
                        args.wait_stats);
    }
}

using Kernel = void (*)(LowLatencyCombineArgs, CombinePlan);
constexpr Kernel kSums = low_latency_combine<Form::kSums, false>;
constexpr Kernel kSumsInTime = low_latency_combine<Form::kSumsInTime, false>;
constexpr Kernel kRows = low_latency_combine<Form::kRows, false>;
constexpr Kernel kLogFmt = low_latency_combine<Form::kLogFmt, false>;
constexpr Kernel kSumsBySource = low_latency_combine<Form::kSums, true>;
constexpr Kernel kLogFmtBySource = low_latency_combine<Form::kLogFmt, true>;

// A grid for jobs of about `num_tokens` tokens; few jobs for each block, since latency counts.
unsigned num_blocks(const LowLatencyCombineArgs& args, const RowPieces& cut, int num_sms) {
    // How many tokens the others have is not known here: at least a quarter of what they may have is reckoned with.
    const int64_t tokens = std::max(args.num_tokens, (args.num_max_tokens + 3) / 4);
    const int64_t jobs = tokens * cut.count;
    return static_cast<unsigned>(std::clamp<int64_t>((jobs + 3) / 4, 1, std::max(num_sms, 1)));
}

}  // namespace

void prepare_low_latency_combine() {
    for (const Kernel kernel : {kSums, kSumsInTime, kRows, kLogFmt, kSumsBySource, kLogFmtBySource})
        load_kernel(kernel, "low_latency_combine");
}

void launch_low_latency_combine(const LowLatencyCombineArgs& given, LowLatencyPart part, int num_sms,
                                Stream stream) {
    LowLatencyCombineArgs args = given;
    constexpr auto* kName = "low_latency_combine";
    check_limit(args.num_topk, args.ll.layout.num_topk, kName, "the number of selections of a token");
    check_limit(args.num_tokens, args.num_max_tokens, kName, "the number of tokens");
    const int64_t row_bytes = 2 * static_cast<int64_t>(args.hidden);
    // Rows that travel plain altogether need nothing of it.
    args.use_logfmt = args.use_logfmt && !logfmt_travels_plain(args.hidden);
    const int64_t side_bytes = args.use_logfmt ? args.hidden / kTile * kLogFmtSideBytes : 0;
    check_limit(row_bytes + side_bytes, args.ll.layout.slot_bytes, kName, "the size of a row");
    check_limit(args.num_max_tokens, args.ll.layout.num_max_tokens, kName, "the largest number of tokens");
    if (!args.expert_major && (args.sum_at_home || args.positions == nullptr))
        throw std::invalid_argument(
            "deep_ep: low_latency_combine: rows by source need positions, and are sums already");
    const int num_line_tokens = args.ll.layout.combine_line_tokens;
    if (num_line_tokens > 0)
        check_limit(by_steps(args.hidden).count * kLineStepBytes, args.ll.layout.line_row_bytes, kName,
                    "a row in lines");
    const auto launch = [&](Kernel kernel, bool in_lines, bool is_long, const RowPieces& cut) {
        const CombinePlan plan{part,
                               may_overlap(args.ll.domain, num_sms),
                               in_lines,
                               is_long,
                               cut,
                               ExpertMap::of(args.num_experts, args.ll.domain.num_ranks),
                               SmallDivider::of(args.num_topk),
                               SmallDivider::of(cut.count)};
        launch_early(kernel, num_blocks(args, cut, num_sms), kNumThreads, 0,
                     static_cast<cudaStream_t>(stream), kName, args, plan);
    };
    // Pieces are so short that each warp gets one.
    const auto launch_summed = [&](Kernel kernel, int num_tokens) {
        const bool in_lines = num_tokens <= num_line_tokens;
        const int64_t num_rows = int64_t{std::max(num_tokens, 1)} * std::max(args.ll.domain.num_ranks - 1, 1);
        launch(kernel, in_lines, num_tokens > kShortTokens,
               in_lines ? by_steps(args.hidden) : cut_row(row_bytes, kPiecesWanted / num_rows));
    };
    const int wanted = kPiecesWanted / std::max(args.num_max_tokens, 1);
    if (args.use_logfmt) {
        args.weights = nullptr;
        // Codes take the warps longer than the link.
        launch(args.expert_major ? kLogFmt : kLogFmtBySource, false, false,
               logfmt::cut_row(args.hidden, wanted));
    } else if (!args.expert_major) {
        // All ranks cut alike without having heard of each other; so they do below.
        launch_summed(kSumsBySource, args.num_max_tokens);
    } else if (args.weights != nullptr && !args.sum_at_home) {
        launch_summed(kSums, args.num_max_tokens);
    } else if (part == LowLatencyPart::kWhole && !args.sum_at_home) {
        args.weights = nullptr;
        launch_summed(kSums, args.num_tokens);
    } else {
        // Ranks that take what comes, sums or rows, and ranks that expect sums do not go together.
        constexpr uint64_t kOtherSignature = 0x5DEECE66D;
        args.signature ^= kOtherSignature;
        args.weights = nullptr;
        const bool in_lines = !args.sum_at_home && args.num_max_tokens <= num_line_tokens;
        launch(in_lines ? kSumsInTime : kRows, in_lines, true,
               in_lines ? by_steps(args.hidden) : cut_row(row_bytes, wanted));
    }
}

}  // namespace deep_ep
