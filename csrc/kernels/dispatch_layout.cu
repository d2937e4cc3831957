#include <algorithm>

#include "kernels/peer_launch.h"
#include "layout/expert_range.h"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"
#include "sync/exchange.cuh"

namespace deep_ep {
namespace {

constexpr int kNumThreads = 256;
constexpr int kMaxBlocks = 32;
constexpr int kBatch = 4;         // indices that a thread reads together
constexpr int kMaxTokens = 1024;  // of a block at a time

// Blocks count into shared memory, add to counters that are zero between calls, and the last one hands the sums out and
// clears them: one launch, no memset. Sums of integers do not depend on the order.
template <class Index>
__global__ void __launch_bounds__(kNumThreads)
    dispatch_layout(const __grid_constant__ DispatchLayoutArgs args, const int block_tokens) {
    extern __shared__ uint32_t counts[];  // [num_ranks] then [num_experts]
    __shared__ uint32_t ranks_of[kMaxTokens];
    const int num_ranks = args.domain.num_ranks, num_counts = num_ranks + args.num_experts;
    const auto* topk_idx = static_cast<const Index*>(args.topk_idx);
    ControlBlock* control = sync::own_control(args.domain);
    for (int i = threadIdx.x; i < num_counts; i += kNumThreads) counts[i] = 0;
    for (int first = blockIdx.x * block_tokens; first < args.num_tokens; first += gridDim.x * block_tokens) {
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
        // A thread a token and rank, so that neighbours write neighbouring bytes; a warp adds what its threads have in
        // common by one atomic for each rank.
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
    __syncthreads();
    for (int i = threadIdx.x; i < num_counts; i += kNumThreads) {
        if (counts[i] != 0) atomicAdd(&control->layout_counts[i], counts[i]);
    }
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = ptx::add_acq_rel_gpu(&control->layout_arrived, 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    for (int i = threadIdx.x; i < num_counts; i += kNumThreads) {
        const auto sum = static_cast<int32_t>(atomicExch(&control->layout_counts[i], 0u));
        if (i < num_ranks) {
            args.num_tokens_per_rank[i] = sum;
        } else {
            args.num_tokens_per_expert[i - num_ranks] = sum;
        }
    }
    if (threadIdx.x == 0) control->layout_arrived = 0;
}

}  // namespace

void prepare_dispatch_layout() {
    load_kernel(dispatch_layout<int64_t>, "dispatch_layout");
    load_kernel(dispatch_layout<int32_t>, "dispatch_layout");
}

void launch_dispatch_layout(const DispatchLayoutArgs& args, Stream stream) {
    check_limit(args.num_experts, kMaxLayoutExperts, "dispatch_layout", "the number of experts");
    const int share = (args.num_tokens + kMaxBlocks - 1) / kMaxBlocks;
    const int block_tokens = std::clamp(share, 1, kMaxTokens);
    const int blocks = std::clamp((args.num_tokens + block_tokens - 1) / block_tokens, 1, kMaxBlocks);
    const size_t shared = sizeof(uint32_t) * (args.domain.num_ranks + args.num_experts);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (args.topk_is_int64) {
        dispatch_layout<int64_t><<<blocks, kNumThreads, shared, cuda_stream>>>(args, block_tokens);
    } else {
        dispatch_layout<int32_t><<<blocks, kNumThreads, shared, cuda_stream>>>(args, block_tokens);
    }
    check_launch("dispatch_layout");
}

}  // namespace deep_ep
