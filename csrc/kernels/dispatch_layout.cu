#include <cooperative_groups.h>

#include <algorithm>

#include "kernels/peer_launch.h"
#include "layout/expert_range.h"
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

// One cluster: blocks count into shared memory, and each then sums a share of the counters over all blocks. No counters in
// global memory, which would cost a fence, an arrival counter and two more latencies.
template <class Index>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kNumThreads)
    dispatch_layout(const __grid_constant__ DispatchLayoutArgs args, const int block_tokens) {
    extern __shared__ uint32_t counts[];  // [num_ranks] then [num_experts]
    __shared__ uint32_t ranks_of[kMaxTokens];
    const int num_ranks = args.domain.num_ranks, num_counts = num_ranks + args.num_experts;
    const auto* topk_idx = static_cast<const Index*>(args.topk_idx);
    for (int i = threadIdx.x; i < num_counts; i += kNumThreads) counts[i] = 0;
    for (int first = blockIdx.x * block_tokens; first < args.num_tokens; first += kBlocks * block_tokens) {
        const int num_tokens = min(block_tokens, args.num_tokens - first);
        const int num_indices = num_tokens * args.num_topk;
        const Index* indices = topk_idx + static_cast<int64_t>(first) * args.num_topk;
        for (int t = threadIdx.x; t < num_tokens; t += kNumThreads) ranks_of[t] = 0;
        __syncthreads();
        for (int begin = threadIdx.x; begin < num_indices; begin += kNumThreads * kBatch) {
            Index experts[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const int i = begin + b * kNumThreads;
                experts[b] = i < num_indices ? indices[i] : Index{-1};
            }
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const Index expert = experts[b];
                if (expert == -1) continue;
                const int i = begin + b * kNumThreads, token = i / args.num_topk;
                if (expert < 0 || expert >= args.num_experts) {
                    sync::report(args.domain, DeviceError::kExpertRange, Operation::kDispatch, Phase::kLayout,
                                 i % args.num_topk, first + token, static_cast<uint64_t>(expert));
                    continue;
                }
                const int rank = rank_of_expert(static_cast<int>(expert), args.num_experts, num_ranks);
                atomicOr(&ranks_of[token], 1u << rank);
                atomicAdd(&counts[num_ranks + static_cast<int>(expert)], 1u);
            }
        }
        __syncthreads();
        const int num_flags = num_tokens * num_ranks;
        uint8_t* in_rank = args.is_token_in_rank + static_cast<int64_t>(first) * num_ranks;
        for (int i = threadIdx.x; i < num_flags; i += kNumThreads) {
            in_rank[i] = ranks_of[i / num_ranks] >> (i % num_ranks) & 1u;
        }
        for (int t = threadIdx.x; t - static_cast<int>(threadIdx.x % 32) < num_tokens; t += kNumThreads) {
            const uint32_t ranks = t < num_tokens ? ranks_of[t] : 0;
            for (int r = 0; r < num_ranks; ++r) {
                const unsigned votes = __ballot_sync(0xFFFFFFFFu, ranks >> r & 1u);
                if (threadIdx.x % 32 == 0 && votes != 0) atomicAdd(&counts[r], __popc(votes));
            }
        }
        __syncthreads();
    }
    auto cluster = cg::this_cluster();
    cluster.sync();
    const int share = (num_counts + kBlocks - 1) / kBlocks, begin = static_cast<int>(blockIdx.x) * share;
    for (int i = begin + threadIdx.x; i < min(begin + share, num_counts); i += kNumThreads) {
        uint32_t sum = 0;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) sum += cluster.map_shared_rank(counts, b)[i];
        if (i < num_ranks) {
            args.num_tokens_per_rank[i] = static_cast<int32_t>(sum);
        } else {
            args.num_tokens_per_expert[i - num_ranks] = static_cast<int32_t>(sum);
        }
    }
    // Shared memory of a block stays until all have read it.
    cluster.sync();
}

}  // namespace

void prepare_dispatch_layout() {
    load_kernel(dispatch_layout<int64_t>, "dispatch_layout");
    load_kernel(dispatch_layout<int32_t>, "dispatch_layout");
}

void launch_dispatch_layout(const DispatchLayoutArgs& args, Stream stream) {
    check_limit(args.num_experts, kMaxLayoutExperts, "dispatch_layout", "the number of experts");
    const int block_tokens = std::clamp((args.num_tokens + kBlocks - 1) / kBlocks, 1, kMaxTokens);
    const size_t shared = sizeof(uint32_t) * (args.domain.num_ranks + args.num_experts);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (args.topk_is_int64) {
        dispatch_layout<int64_t><<<kBlocks, kNumThreads, shared, cuda_stream>>>(args, block_tokens);
    } else {
        dispatch_layout<int32_t><<<kBlocks, kNumThreads, shared, cuda_stream>>>(args, block_tokens);
    }
    check_launch("dispatch_layout");
}

}  // namespace deep_ep
