#include "kernels/peer_launch.h"
#include "layout/expert_range.h"
#include "ptx/grid.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"
#include "sync/exchange.cuh"

namespace deep_ep {
namespace {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / 32 - 1;  // that share the tokens; the last one tells the host
constexpr int kBatch = 4;                        // groups of 32 tokens that a warp reads together
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Each warp owns a contiguous range of tokens, so that running numbers follow the token order.
struct TokenRange {
    int begin, end;
};

__device__ TokenRange tokens_of_warp(int num_tokens, int warp) {
    const int share = (num_tokens + kNumWarps - 1) / kNumWarps;
    return {min(warp * share, num_tokens), min((warp + 1) * share, num_tokens)};
}

// Whether this lane's tokens of a batch go to a rank. Read together: one after the other they would cost a latency each.
struct Goes {
    bool v[kBatch];
};

__device__ __forceinline__ Goes read_goes(const DispatchNotifyArgs& args, int first, int end, int rank,
                                          int lane) {
    Goes goes;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
        const int token = first + b * 32 + lane;
        goes.v[b] = token < end &&
                    args.is_token_in_rank[static_cast<int64_t>(token) * args.domain.num_ranks + rank] != 0;
    }
    return goes;
}

// What the host waits for, or, with a fixed capacity, whether that is too small. By one warp.
__device__ void tell_host(const DispatchNotifyArgs& args, uint64_t epoch, const int* totals, int lane) {
    const Domain& domain = args.domain;
    const int num_ranks = domain.num_ranks, rank = domain.rank;
    HostRecord* host = domain.host;
    const bool overflows =
        lane < num_ranks && totals[lane] > sync::announcement(domain, lane, rank, epoch)->capacity;
    const unsigned overflowing = __ballot_sync(kAllLanes, overflows);
    if (args.fixed_capacity) {
        // It has no host to tell its counts to: it may run when the host already waits for those of a later call.
        if (lane != 0 || overflowing == 0) return;
        const int first = __ffs(overflowing) - 1;
        host->overflow_rank = first;
        host->overflow_capacity = sync::announcement(domain, first, rank, epoch)->capacity;
        ptx::fence_acq_rel_sys();
        host->overflow_total = totals[first];
        return;
    }
    for (int i = lane; i < num_ranks * num_ranks; i += 32) {
        host->send_counts[i] =
            sync::announcement(domain, i / num_ranks, rank, epoch)->send_counts[i % num_ranks];
    }
    const ExpertRange local = expert_range(args.num_experts, num_ranks, rank);
    for (int e = lane; e < local.count; e += 32) {
        int sum = 0;
        for (int src = 0; src < num_ranks; ++src) {
            sum += sync::announcement(domain, src, rank, epoch)->expert_counts[e];
        }
        host->expert_counts[e] = sum;
    }
    __syncwarp();
    if (lane != 0) return;
    host->num_recv = totals[rank];
    host->fits = overflowing == 0;
    ptx::fence_acq_rel_sys();
    host->epoch = epoch;
}

// One block: it waits for peers, so more would only hold more SMs.
__global__ void __launch_bounds__(kNumThreads)
    dispatch_notify(const __grid_constant__ DispatchNotifyArgs args) {
    __shared__ int channel_counts[kMaxPeers][kMaxChannels];
    __shared__ int warp_counts[kNumWarps + 1][kMaxPeers];
    __shared__ int32_t own_counts[kMaxPeers];
    __shared__ int first_row[kMaxPeers];
    __shared__ int all_here;
    const Domain& domain = args.domain;
    const int num_ranks = domain.num_ranks, rank = domain.rank, num_channels = args.num_channels;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    // dispatch_rows may take its place on the SMs now; it waits for the end of this kernel.
    ptx::launch_dependents();
    ptx::wait_for_earlier_kernels();
    const uint64_t epoch = sync::own_control(domain)->epoch + 1;
    const int channel_tokens = max((args.num_tokens + num_channels - 1) / num_channels, 1);

    for (int i = threadIdx.x; i < num_ranks * num_channels; i += kNumThreads) {
        channel_counts[i / num_channels][i % num_channels] = 0;
    }
    if (threadIdx.x == 0) all_here = 1;
    if (threadIdx.x < num_ranks) own_counts[threadIdx.x] = args.num_tokens_per_rank[threadIdx.x];
    __syncthreads();

    // Tokens of this warp for each rank, and of each channel.
    const TokenRange range = tokens_of_warp(args.num_tokens, warp);
    int mine = 0;  // in lane r: tokens of this warp for rank r
    for (int first = range.begin; first < range.end; first += 32 * kBatch) {
        for (int r = 0; r < num_ranks; ++r) {
            const Goes goes = read_goes(args, first, range.end, r, lane);
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const unsigned votes = __ballot_sync(kAllLanes, goes.v[b]);
                if (lane == r) mine += __popc(votes);
                // Most often the 32 tokens are of one channel.
                const int begin = first + b * 32, channel = begin / channel_tokens;
                if (begin >= range.end) break;
                if (begin + 32 <= (channel + 1) * channel_tokens) {
                    if (lane == 0 && votes != 0) atomicAdd(&channel_counts[r][channel], __popc(votes));
                } else if (goes.v[b]) {
                    atomicAdd(&channel_counts[r][(begin + lane) / channel_tokens], 1);
                }
            }
        }
    }
    warp_counts[warp][lane] = mine;
    __syncthreads();
    if (threadIdx.x < num_ranks) {
        int sum = 0;
        for (int c = 0; c < num_channels; ++c) {
            sum += channel_counts[threadIdx.x][c];
            channel_counts[threadIdx.x][c] = sum;  // inclusive
            args.channel_prefix_matrix[threadIdx.x * num_channels + c] = sum;
        }
    }
    __syncthreads();

    // Announce: every warp writes to the peers it owns.
    for (int peer = warp; peer < num_ranks; peer += kNumWarps) {
        Announcement* message = sync::open_announcement(domain, peer, epoch);
        for (int r = lane; r < num_ranks; r += 32) message->send_counts[r] = own_counts[r];
        for (int c = lane; c < num_channels; c += 32) {
            message->channel_start[c] = c == 0 ? 0 : channel_counts[peer][c - 1];
        }
        const ExpertRange experts = expert_range(args.num_experts, num_ranks, peer);
        for (int e = lane; e < experts.count; e += 32) {
            message->expert_counts[e] = args.num_tokens_per_expert[experts.first + e];
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
        // The warp's stores come before the release by lane 0.
        __syncwarp();
        if (lane == 0) sync::publish(domain, peer, epoch);
    }
    if (threadIdx.x < num_ranks && !sync::await_announcement(domain, static_cast<int>(threadIdx.x), epoch,
                                                             args.signature, Operation::kDispatch)) {
        all_here = 0;
    }
    __syncthreads();
    if (!all_here) {
        // A peer that gave up is no failure, but the host must not wait for its counts.
        if (threadIdx.x == 0 && !args.fixed_capacity && !sync::has_failed(domain))
            domain.host->epoch = kRefusedSignature;
        return;
    }

    // Everybody's counts are here: rows of rank r at its destinations follow those of the ranks before it.
    __shared__ int totals[kMaxPeers];
    if (threadIdx.x < num_ranks) {
        const int dst = static_cast<int>(threadIdx.x);
        int sum = 0;
        for (int src = 0; src < num_ranks; ++src) {
            if (src == rank) first_row[dst] = sum;
            sum += sync::announcement(domain, src, rank, epoch)->send_counts[dst];
            args.rank_prefix_matrix[src * num_ranks + dst] = sum;
        }
        totals[dst] = sum;
    }
    __syncthreads();
    // The last warp, which has no tokens, tells the host; the others go on.
    if (warp == kNumWarps) tell_host(args, epoch, totals, lane);

    // The handle: rows at the destinations, and where channels start in what arrives.
    for (int i = threadIdx.x; i < num_ranks * num_channels; i += kNumThreads) {
        args.recv_channel_prefix_matrix[i] =
            sync::announcement(domain, i / num_channels, rank, epoch)->channel_start[i % num_channels];
    }
    int next = 0;  // in lane r: row at rank r of this warp's next token
    if (lane < num_ranks) {
        next = first_row[lane];
        for (int w = 0; w < warp; ++w) next += warp_counts[w][lane];
    }
    for (int first = range.begin; first < range.end; first += 32 * kBatch) {
        for (int r = 0; r < num_ranks; ++r) {
            const Goes goes = read_goes(args, first, range.end, r, lane);
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const int token = first + b * 32 + lane;
                const unsigned votes = __ballot_sync(kAllLanes, goes.v[b]);
                const int before = __shfl_sync(kAllLanes, next, r) + __popc(votes & ((1u << lane) - 1));
                if (token < range.end) {
                    args.send_head[static_cast<int64_t>(token) * num_ranks + r] = goes.v[b] ? before : -1;
                }
                if (lane == r) next += __popc(votes);
            }
        }
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
                 args);
}

}  // namespace deep_ep
