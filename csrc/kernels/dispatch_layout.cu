#include <cooperative_groups.h>

#include <algorithm>
#include <utility>

#include "kernels/peer_launch.h"
#include "layout/expert_range.h"
#include "ptx/grid.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"
#include "sync/exchange.cuh"

namespace deep_ep {
namespace {

namespace cg = cooperative_groups;

constexpr int kNumThreads = 1024;
constexpr int kBlocks = 8;        // one cluster, the largest that every GPU grants
constexpr int kBatch = 4;         // indices that a thread reads together
constexpr int kMaxTokens = 1024;  // of a block at a time

// How the host cut the work, and what it divides by.
struct LayoutPlan {
    int block_tokens;  // of a block at a time
    int share;         // sums that a block keeps
    ExpertMap experts;
    SmallDivider by_topk, by_ranks, by_share;
};

// The bit of each lane's token joined over the lanes of that token, where a token has `num_topk` lanes in a row of a warp.
__device__ __forceinline__ uint32_t join_token(uint32_t bit, int num_topk) {
    for (int offset = num_topk / 2; offset > 0; offset /= 2) bit |= __shfl_xor_sync(0xFFFFFFFFu, bit, offset);
    return bit;
}

// Counts the tokens [first, first + num_tokens) into `counts` ([num_ranks] then [num_experts]), and says where they go.
template <class Index>
__device__ __forceinline__ void count_tokens(const DispatchLayoutArgs& args, const LayoutPlan& plan,
                                             int first, int num_tokens, uint32_t* counts,
                                             uint32_t* ranks_of) {
    const int num_ranks = args.domain.num_ranks, num_topk = args.num_topk,
              thread = static_cast<int>(threadIdx.x);
    const int num_indices = num_tokens * num_topk;
    const Index* indices = static_cast<const Index*>(args.topk_idx) + static_cast<int64_t>(first) * num_topk;
    // Then a token's lanes lie in one warp, as the threads' indices are multiples of 32 apart.
    const bool is_joined = num_topk <= 32 && (num_topk & (num_topk - 1)) == 0;
    if (!is_joined) {
        for (int t = thread; t < num_tokens; t += kNumThreads) ranks_of[t] = 0;
        __syncthreads();
    }
    for (int begin = 0; begin < num_indices; begin += kNumThreads * kBatch) {
        Index experts[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int i = begin + b * kNumThreads + thread;
            experts[b] = i < num_indices ? indices[i] : Index{-1};
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const Index expert = experts[b];
            const int i = begin + b * kNumThreads + thread, token = plan.by_topk.quotient(i);
            uint32_t bit = 0;
            if (expert >= 0 && expert < args.num_experts) {
                bit = 1u << plan.experts.owner(static_cast<int>(expert));
                atomicAdd(&counts[num_ranks + static_cast<int>(expert)], 1u);
            } else if (expert != -1) {
                sync::report(args.domain, DeviceError::kExpertRange, Operation::kDispatch, Phase::kLayout,
                             i - token * num_topk, first + token, static_cast<uint64_t>(expert));
            }
            if (is_joined) {
                bit = join_token(bit, num_topk);
                if (i < num_indices && i == token * num_topk) ranks_of[token] = bit;
            } else if (bit != 0) {
                atomicOr(&ranks_of[token], bit);
            }
        }
    }
    __syncthreads();
    const int num_flags = num_tokens * num_ranks;
    uint8_t* in_rank = args.is_token_in_rank + static_cast<int64_t>(first) * num_ranks;
    for (int i = thread; i < num_flags; i += kNumThreads) {
        const int token = plan.by_ranks.quotient(i);
        in_rank[i] = ranks_of[token] >> (i - token * num_ranks) & 1u;
    }
    for (int t = thread; t - thread % 32 < num_tokens; t += kNumThreads) {
        const uint32_t ranks = t < num_tokens ? ranks_of[t] : 0;
        for (int r = 0; r < num_ranks; ++r) {
            const unsigned votes = __ballot_sync(0xFFFFFFFFu, ranks >> r & 1u);
            if (thread % 32 == 0 && votes != 0) atomicAdd(&counts[r], __popc(votes));
        }
    }
    __syncthreads();
}

// One cluster: blocks count into their own shared memory and add that to the sums, of which each block keeps a share. No
// counters in global memory, which would cost a fence, an arrival counter and two more latencies.
template <class Index>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kNumThreads)
    dispatch_layout(const __grid_constant__ DispatchLayoutArgs args,
                    const __grid_constant__ LayoutPlan plan) {
    extern __shared__ uint32_t
        counts[];  // [num_ranks] then [num_experts], then this block's share of the sums
    __shared__ uint32_t ranks_of[kMaxTokens];
    const int num_counts = args.domain.num_ranks + args.num_experts, thread = static_cast<int>(threadIdx.x);
    const int share = plan.share, block_tokens = plan.block_tokens;
    uint32_t* sums = counts + num_counts;
    ptx::launch_dependents();
    for (int i = thread; i < num_counts + share; i += kNumThreads) counts[i] = 0;
    __syncthreads();
    auto cluster = cg::this_cluster();
    // The sums of all blocks are zero when all have come here; nobody waits for it before there is something to add.
    auto zeroed = cluster.barrier_arrive();
    ptx::wait_for_earlier_kernels();
    for (int first = blockIdx.x * block_tokens; first < args.num_tokens; first += kBlocks * block_tokens) {
        count_tokens<Index>(args, plan, first, min(block_tokens, args.num_tokens - first), counts, ranks_of);
    }
    cluster.barrier_wait(std::move(zeroed));
    for (int i = thread; i < num_counts; i += kNumThreads) {
        if (counts[i] == 0) continue;
        const int keeper = plan.by_share.quotient(i);
        atomicAdd(cluster.map_shared_rank(sums, keeper) + (i - keeper * share), counts[i]);
    }
    cluster.sync();
    const int begin = static_cast<int>(blockIdx.x) * share;
    for (int i = begin + thread; i < min(begin + share, num_counts); i += kNumThreads) {
        const auto sum = static_cast<int32_t>(sums[i - begin]);
        if (i < args.domain.num_ranks) {
            args.num_tokens_per_rank[i] = sum;
        } else {
            args.num_tokens_per_expert[i - args.domain.num_ranks] = sum;
        }
    }
}

}  // namespace

void prepare_dispatch_layout() {
    load_kernel(dispatch_layout<int64_t>, "dispatch_layout");
    load_kernel(dispatch_layout<int32_t>, "dispatch_layout");
}

void launch_dispatch_layout(const DispatchLayoutArgs& args, Stream stream) {
    check_limit(args.num_experts, kMaxLayoutExperts, "dispatch_layout", "the number of experts");
    const int num_ranks = args.domain.num_ranks, num_counts = num_ranks + args.num_experts;
    const int share = (num_counts + kBlocks - 1) / kBlocks;
    // So few that the divider stays exact.
    const int64_t num_topk = std::max(args.num_topk, 1),
                  exact = (int64_t{1} << 32) / (num_topk * num_topk + 1);
    const auto most_tokens = static_cast<int>(std::clamp<int64_t>(exact, 1, kMaxTokens));
    const LayoutPlan plan{std::clamp((args.num_tokens + kBlocks - 1) / kBlocks, 1, most_tokens),
                          share,
                          ExpertMap::of(args.num_experts, num_ranks),
                          SmallDivider::of(static_cast<int>(num_topk)),
                          SmallDivider::of(num_ranks),
                          SmallDivider::of(share)};
    const size_t shared = sizeof(uint32_t) * (num_counts + (num_counts + kBlocks - 1) / kBlocks);
    auto* const kernel = args.topk_is_int64 ? dispatch_layout<int64_t> : dispatch_layout<int32_t>;
    launch_early(kernel, kBlocks, kNumThreads, shared, static_cast<cudaStream_t>(stream), "dispatch_layout",
                 args, plan);
}

}  // namespace deep_ep
