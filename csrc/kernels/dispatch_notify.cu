#include "kernels/peer_launch.h"
#include "layout/expert_range.h"
#include "ptx/grid.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"
#include "sync/exchange.cuh"

namespace deep_ep {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / 32;
static_assert(kNumWarps >= kMaxPeers, "a warp for each peer");
// A lane keeps the flags of so many groups of 32 tokens for so many ranks, a bit each, and reads those of half of the ranks
// together: one after the other they would cost a latency each.
constexpr int kGroups = 4;
constexpr int kRanks = 8;
constexpr int kTogether = kRanks / 2;
static_assert(kGroups * kRanks == 32, "the bits of a word");
constexpr int kGroupTokens = 32 * kGroups;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Each warp owns a contiguous range of tokens, so that running numbers follow the token order.
struct TokenRange {
    int begin, end;
};

__device__ TokenRange tokens_of_warp(int num_tokens, int warp) {
    const int share = (num_tokens + kNumThreads - 1) / kNumThreads * 32;  // whole groups
    return {min(warp * share, num_tokens), min((warp + 1) * share, num_tokens)};
}

__device__ __forceinline__ uint32_t bit_of(int rank, int group) {
    return 1u << (rank * kGroups + group);
}

// Which ranks from `first_rank` on this lane's tokens of the groups from `first` on go to.
__device__ __forceinline__ uint32_t read_goes(const DispatchNotifyArgs& args, int first, int end,
                                              int first_rank, int lane) {
    const int num_ranks = args.domain.num_ranks;
    uint32_t goes = 0;
#pragma unroll
    for (int from = 0; from < kRanks; from += kTogether) {
        uint8_t flags[kTogether][kGroups] = {};
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
            const int rank = first_rank + from + r;
            if (rank >= num_ranks) break;
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                const int token = first + g * 32 + lane;
                if (token < end) {
                    flags[r][g] = args.is_token_in_rank[static_cast<int64_t>(token) * num_ranks + rank];
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) goes |= flags[r][g] != 0 ? bit_of(from + r, g) : 0;
        }
        if (first_rank + from + kTogether >= num_ranks) break;
    }
    return goes;
}

// The sum of the lanes up to this one.
__device__ __forceinline__ int sum_upto(int value, int lane) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int before = __shfl_up_sync(kAllLanes, value, offset);
        if (lane >= offset) value += before;
    }
    return value;
}

// What the exchange of counts says, in shared memory.
struct Exchange {
    int32_t sent[kMaxPeers][kMaxPeers + 1];  // rows from each rank to each; padded, since lanes go both ways
    int first_row[kMaxPeers];                // of this rank's rows at each rank
    int num_recv;
    int first_too_small;  // the first rank whose capacity does not suffice, and -1 if there is none
    int64_t its_capacity;
    int its_total;
};

// Waits for the counts of all ranks; by one warp.
__device__ bool await_counts(const DispatchNotifyArgs& args, uint64_t epoch, Exchange& exchange, int lane) {
    const Domain& domain = args.domain;
    const int num_ranks = domain.num_ranks, rank = domain.rank;
    bool here = true;
    int64_t capacity = 0;
    if (lane < num_ranks) {
        here = sync::await_announcement(domain, lane, epoch, Operation::kDispatch);
        // Read together, before it is known whether they count.
        const Announcement* theirs = sync::announcement(domain, lane, rank, epoch);
        const uint64_t signature = theirs->signature;
        capacity = theirs->capacity;
#pragma unroll 8
        for (int dst = 0; dst < num_ranks; ++dst) exchange.sent[lane][dst] = theirs->send_counts[dst];
        here = here && sync::agrees(domain, lane, args.signature, signature, Operation::kDispatch);
    }
    if (!__all_sync(kAllLanes, here)) return false;
    // Rows of rank r at its destinations follow those of the ranks before it.
    int total = 0;
    if (lane < num_ranks) {
        for (int src = 0; src < num_ranks; ++src) {
            if (src == rank) exchange.first_row[lane] = total;
            total += exchange.sent[src][lane];
            args.rank_prefix_matrix[src * num_ranks + lane] = total;
        }
    }
    const unsigned too_small = __ballot_sync(kAllLanes, total > capacity);
    const int first = __ffs(too_small) - 1;
    if (lane == rank) exchange.num_recv = total;
    if (lane == max(first, 0)) {
        exchange.first_too_small = first;
        exchange.its_capacity = capacity;
        exchange.its_total = total;
    }
    return true;
}

// What the host waits for, or, with a fixed capacity, whether that is too small. By the whole block.
__device__ void tell_host(const DispatchNotifyArgs& args, uint64_t epoch, const Exchange& exchange) {
    const Domain& domain = args.domain;
    const int num_ranks = domain.num_ranks, thread = static_cast<int>(threadIdx.x);
    HostRecord* host = domain.host;
    if (args.fixed_capacity) {
        // It has no host to tell its counts to: it may run when the host already waits for those of a later call.
        if (thread != 0 || exchange.first_too_small < 0) return;
        host->overflow_rank = exchange.first_too_small;
        host->overflow_capacity = exchange.its_capacity;
        ptx::fence_acq_rel_sys();
        host->overflow_total = exchange.its_total;
        return;
    }
    const ExpertRange local = expert_range(args.num_experts, num_ranks, domain.rank);
    for (int e = thread; e < local.count; e += kNumThreads) {
        int sum = 0;
#pragma unroll 4
        for (int src = 0; src < num_ranks; ++src) {
            sum += sync::announcement(domain, src, domain.rank, epoch)->expert_counts[e];
        }
        host->expert_counts[e] = sum;
    }
    for (int i = thread; i < num_ranks * num_ranks; i += kNumThreads) {
        host->send_counts[i] = exchange.sent[i / num_ranks][i % num_ranks];
    }
    __syncthreads();
    if (thread != 0) return;
    host->num_recv = exchange.num_recv;
    host->fits = exchange.first_too_small < 0;
    ptx::fence_acq_rel_sys();
    host->epoch = epoch;
}

// One block: it waits for peers, so more would only hold more SMs. Its every step is waited for: dispatch_rows, which runs
// beside it, moves nothing before send_head is written.
__global__ void __launch_bounds__(kNumThreads)
    dispatch_notify(const __grid_constant__ DispatchNotifyArgs args,
                    const __grid_constant__ ExpertMap experts) {
    __shared__ int channel_counts[kMaxPeers][kMaxChannels];
    __shared__ int warp_rows[kNumWarps][kMaxPeers + 1];  // of each warp's tokens, then of those before
    __shared__ int32_t own_counts[kMaxPeers];
    __shared__ Exchange exchange;
    __shared__ bool all_here;
    const Domain& domain = args.domain;
    const int num_ranks = domain.num_ranks, rank = domain.rank, num_channels = args.num_channels;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    // dispatch_rows may take its place on the SMs now.
    ptx::launch_dependents();
    for (int i = thread; i < num_ranks * num_channels; i += kNumThreads) {
        channel_counts[i / num_channels][i % num_channels] = 0;
    }
    __syncthreads();
    ptx::wait_for_earlier_kernels();
    const uint64_t epoch = sync::own_control(domain)->epoch + 1;
    const TokenRange range = tokens_of_warp(args.num_tokens, warp);
    // Most calls have one round of reading, whose bits stay in the register until the places are written.
    const bool one_round = num_ranks <= kRanks && range.end - range.begin <= kGroupTokens;
    uint32_t goes = read_goes(args, range.begin, range.end, 0, lane);
    const int32_t expert_count = thread < experts.num_experts ? args.num_tokens_per_expert[thread] : 0;
    if (thread == 0) sync::tell_routing(domain, epoch);
    if (thread < num_ranks) sync::open_announcement(domain, thread, epoch);

    // Tokens of this warp for each rank, and of each channel.
    const int channel_tokens = max((args.num_tokens + num_channels - 1) / num_channels, 1);
    int mine = 0;  // in lane r: tokens of this warp for rank r
    for (int first = range.begin; first < range.end; first += kGroupTokens) {
        for (int first_rank = 0; first_rank < num_ranks; first_rank += kRanks) {
            if (!one_round) goes = read_goes(args, first, range.end, first_rank, lane);
            for (int r = 0; r < kRanks && first_rank + r < num_ranks; ++r) {
                const int dst = first_rank + r;
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    const bool is_sent = (goes & bit_of(r, g)) != 0;
                    const unsigned votes = __ballot_sync(kAllLanes, is_sent);
                    if (lane == dst) mine += __popc(votes);
                    // Most often the 32 tokens are of one channel.
                    const int begin = first + g * 32, channel = begin / channel_tokens;
                    if (begin + 32 <= (channel + 1) * channel_tokens) {
                        if (lane == 0 && votes != 0) atomicAdd(&channel_counts[dst][channel], __popc(votes));
                    } else if (is_sent) {
                        atomicAdd(&channel_counts[dst][(begin + lane) / channel_tokens], 1);
                    }
                }
            }
        }
    }
    warp_rows[warp][lane] = mine;
    for (int e = thread; e < experts.num_experts; e += kNumThreads) {
        const int peer = experts.owner(e);
        sync::announcement(domain, rank, peer, epoch)->expert_counts[e - experts.first(peer)] =
            e == thread ? expert_count : args.num_tokens_per_expert[e];
    }
    __syncthreads();

    // A warp for each peer.
    const int peer = warp;
    Announcement* message = sync::announcement(domain, rank, min(peer, num_ranks - 1), epoch);
    if (peer < num_ranks) {
        const int rows = warp_rows[lane][peer], upto = sum_upto(rows, lane);
        warp_rows[lane][peer] = upto - rows;
        if (lane == 31) own_counts[peer] = upto;
        int before = 0;  // rows of the channels before these
        for (int first = 0; first < num_channels; first += 32) {
            const int channel = first + lane;
            const int count = channel < num_channels ? channel_counts[peer][channel] : 0;
            const int end = before + sum_upto(count, lane);
            if (channel < num_channels) {
                message->channel_start[channel] = end - count;
                args.channel_prefix_matrix[peer * num_channels + channel] = end;
            }
            before = __shfl_sync(kAllLanes, end, 31);
        }
        if (lane == 0) {
            message->signature = args.signature;
            message->rows = args.output.rows;
            message->scales = args.output.scales;
            message->topk_idx = args.output.topk_idx;
            message->topk_weights = args.output.topk_weights;
            message->src_idx = args.output.src_idx;
            message->capacity = args.output.capacity;
        }
    }
    __syncthreads();
    if (peer < num_ranks) {
        if (lane < num_ranks) message->send_counts[lane] = own_counts[lane];
        // The block's stores come before the release by lane 0.
        __syncwarp();
        if (lane == 0) sync::publish(domain, peer, epoch);
    }
    if (warp == 0) {
        const bool here = await_counts(args, epoch, exchange, lane);
        if (lane == 0) all_here = here;
    }
    __syncthreads();
    if (!all_here) {
        if (thread != 0) return;
        // The rows go nowhere, since dispatch_rows sees the same.
        sync::tell_routed(domain, epoch);
        // A peer that gave up is no failure, but the host must not wait for its counts.
        if (!args.fixed_capacity && !sync::has_failed(domain)) domain.host->epoch = kRefusedSignature;
        return;
    }

    // Everybody's counts are here: the places of the rows.
    if (thread == 0 && sync::is_broken(domain, Contract::kPlacesBeforeFlag)) {
        sync::tell_routed(domain, epoch);
        sync::dawdle(domain, sync::Site::kFields, rank, epoch);
    }
    int next = 0;  // in lane r: row at rank r of this warp's next token
    if (lane < num_ranks) next = exchange.first_row[lane] + warp_rows[warp][lane];
    for (int first = range.begin; first < range.end; first += kGroupTokens) {
        for (int first_rank = 0; first_rank < num_ranks; first_rank += kRanks) {
            if (!one_round) goes = read_goes(args, first, range.end, first_rank, lane);
            for (int r = 0; r < kRanks && first_rank + r < num_ranks; ++r) {
                const int dst = first_rank + r;
                int row = __shfl_sync(kAllLanes, next, dst);
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    const int token = first + g * 32 + lane;
                    const bool is_sent = (goes & bit_of(r, g)) != 0;
                    const unsigned votes = __ballot_sync(kAllLanes, is_sent);
                    if (token < range.end) {
                        args.send_head[static_cast<int64_t>(token) * num_ranks + dst] =
                            is_sent ? row + __popc(votes & ((1u << lane) - 1)) : -1;
                    }
                    row += __popc(votes);
                }
                if (lane == dst) next = row;
            }
        }
    }
    __syncthreads();
    if (thread == 0) sync::tell_routed(domain, epoch);

    // What dispatch_rows does not need: the host's part, and where channels start in what arrives.
    tell_host(args, epoch, exchange);
    for (int i = thread; i < num_ranks * num_channels; i += kNumThreads) {
        args.recv_channel_prefix_matrix[i] =
            sync::announcement(domain, i / num_channels, rank, epoch)->channel_start[i % num_channels];
    }
}

}  // namespace

void prepare_dispatch_notify() {
    load_kernel(dispatch_notify, "dispatch_notify");
}

void launch_dispatch_notify(const DispatchNotifyArgs& args, Stream stream) {
    check_limit(args.num_channels, kMaxChannels, "dispatch_notify", "the number of channels");
    // After dispatch_layout, in most programs.
    launch_early(dispatch_notify, 1, kNumThreads, 0, static_cast<cudaStream_t>(stream), "dispatch_notify",
                 args, ExpertMap::of(args.num_experts, args.domain.num_ranks));
}

}  // namespace deep_ep
