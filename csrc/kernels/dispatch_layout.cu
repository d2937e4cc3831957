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

// Blocks count into shared memory, add to counters that are zero between calls, and the last one hands the sums out and
// clears them: one launch, no memset. Sums of integers do not depend on the order.
template <class Index>
__global__ void __launch_bounds__(kNumThreads)
    dispatch_layout(const __grid_constant__ DispatchLayoutArgs args) {
    extern __shared__ uint32_t counts[];  // [num_ranks] then [num_experts]
    const int num_ranks = args.domain.num_ranks, num_counts = num_ranks + args.num_experts;
    const auto* topk_idx = static_cast<const Index*>(args.topk_idx);
    ControlBlock* control = sync::own_control(args.domain);
    for (int i = threadIdx.x; i < num_counts; i += kNumThreads) counts[i] = 0;
    __syncthreads();
    for (int token = blockIdx.x * kNumThreads + threadIdx.x; token < args.num_tokens;
         token += gridDim.x * kNumThreads) {
        uint32_t ranks = 0;
        for (int k = 0; k < args.num_topk; ++k) {
            const Index expert = topk_idx[static_cast<int64_t>(token) * args.num_topk + k];
            if (expert == -1) continue;
            if (expert < 0 || expert >= args.num_experts) {
                sync::report(args.domain, DeviceError::kExpertRange, Operation::kDispatch, Phase::kLayout, k,
                             token, static_cast<uint64_t>(expert));
                continue;
            }
            ranks |= 1u << rank_of_expert(static_cast<int>(expert), args.num_experts, num_ranks);
            atomicAdd(&counts[num_ranks + static_cast<int>(expert)], 1u);
        }
        for (int r = 0; r < num_ranks; ++r) {
            const bool goes = ranks >> r & 1u;
            args.is_token_in_rank[static_cast<int64_t>(token) * num_ranks + r] = goes;
            if (goes) atomicAdd(&counts[r], 1u);
        }
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
    const int blocks = std::clamp((args.num_tokens + kNumThreads - 1) / kNumThreads, 1, kMaxBlocks);
    const size_t shared = sizeof(uint32_t) * (args.domain.num_ranks + args.num_experts);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (args.topk_is_int64) {
        dispatch_layout<int64_t><<<blocks, kNumThreads, shared, cuda_stream>>>(args);
    } else {
        dispatch_layout<int32_t><<<blocks, kNumThreads, shared, cuda_stream>>>(args);
    }
    check_launch("dispatch_layout");
}

}  // namespace deep_ep
