#include <algorithm>

#include "kernels/peer_launch.h"
#include "layout/expert_range.h"
#include "layout/piece_walk.h"
#include "ptx/bulk_copy.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"
#include "sync/exchange.cuh"

namespace deep_ep {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kNumStages = 3;
// Two pieces for a bf16 row of 7,168 columns: shorter pieces keep more warps busy, longer ones cost fewer instructions.
constexpr int64_t kMaxPieceBytes = 8192;
constexpr int kSharedBytes = 216 * 1024;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Addresses at one peer for this operation.
struct Destination {
    uint8_t* rows;
    uint8_t* scales;
    uint8_t* topk_idx;
    float* topk_weights;
    int32_t* src_idx;
    int64_t capacity;
};

template <class T>
__device__ T* at(uint8_t* base, int64_t offset) {
    return offset < 0 ? nullptr : reinterpret_cast<T*>(base + offset);
}

// The own output's place, for every peer; by the whole of block 0.
__device__ void announce(const Domain& domain, const DispatchRowsArgs& args, uint64_t epoch) {
    const int peer = static_cast<int>(threadIdx.x);
    if (peer >= domain.num_ranks) return;
    Announcement* message = sync::announcement(domain, domain.rank, peer, epoch);
    message->signature = args.signature;
    message->rows = args.output.rows;
    message->scales = args.output.scales;
    message->topk_idx = args.output.topk_idx;
    message->topk_weights = args.output.topk_weights;
    message->src_idx = args.output.src_idx;
    message->capacity = args.output.capacity;
    sync::publish(message, epoch);
}

template <class Index>
__device__ void send_topk(const DispatchRowsArgs& args, const Destination& to, int peer, int num_ranks,
                          int token, int64_t row, int lane) {
    const ExpertRange range = expert_range(args.num_experts, num_ranks, peer);
    for (int k = lane; k < args.num_topk; k += 32) {
        const int64_t i = static_cast<int64_t>(token) * args.num_topk + k;
        const Index expert = static_cast<const Index*>(args.topk_idx)[i];
        const bool local = expert >= range.first && expert < range.first + range.count;
        reinterpret_cast<Index*>(to.topk_idx)[row * args.num_topk + k] =
            local ? expert - range.first : Index{-1};
        to.topk_weights[row * args.num_topk + k] = local ? args.topk_weights[i] : 0.0f;
    }
}

// What goes with a row, by ordinary stores of the warp.
__device__ void send_metadata(const DispatchRowsArgs& args, const Destination* destinations, int num_ranks,
                              int token, int32_t head, unsigned mask, int lane) {
    for (unsigned left = mask; left != 0; left &= left - 1) {
        const int peer = __ffs(left) - 1;
        const Destination& to = destinations[peer];
        const int64_t row = __shfl_sync(kAllLanes, head, peer);
        if (to.scales != nullptr) {
            for (int i = lane; i < args.scales_per_token; i += 32) {
                const auto* scales = reinterpret_cast<const uint32_t*>(args.scales);
                reinterpret_cast<uint32_t*>(to.scales)[row * args.scales_per_token + i] =
                    scales[token * args.scales_token_stride + i * args.scales_stride];
            }
        }
        if (to.src_idx != nullptr && lane == 0) to.src_idx[row] = token;
        if (to.topk_idx == nullptr) continue;
        if (args.topk_is_int64) {
            send_topk<int64_t>(args, to, peer, num_ranks, token, row, lane);
        } else {
            send_topk<int32_t>(args, to, peer, num_ranks, token, row, lane);
        }
    }
}

__global__ void __launch_bounds__(kMaxWarps * 32)
    dispatch_rows(const __grid_constant__ DispatchRowsArgs args, const Pieces pieces) {
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ uint64_t loaded[kMaxWarps][kNumStages];
    __shared__ Destination destinations[kMaxPeers];
    const Domain& domain = args.domain;
    const int num_warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32);
    const int lane = static_cast<int>(threadIdx.x % 32);
    const uint64_t epoch = sync::own_control(domain)->epoch + 1;

    if (args.announce && blockIdx.x == 0) announce(domain, args, epoch);
    if (lane == 0) {
        for (int stage = 0; stage < kNumStages; ++stage) ptx::mbarrier_init(&loaded[warp][stage], 1);
        ptx::fence_mbarrier_init();
    }
    __shared__ int all_here;
    if (threadIdx.x == 0) all_here = 1;
    __syncthreads();
    if (threadIdx.x < domain.num_ranks) {
        const int peer = static_cast<int>(threadIdx.x);
        if (sync::await_announcement(domain, peer, epoch, args.signature, Operation::kDispatch)) {
            const Announcement* theirs = sync::announcement(domain, peer, domain.rank, epoch);
            uint8_t* base = domain.base[peer];
            destinations[peer] = {at<uint8_t>(base, theirs->rows),     at<uint8_t>(base, theirs->scales),
                                  at<uint8_t>(base, theirs->topk_idx), at<float>(base, theirs->topk_weights),
                                  at<int32_t>(base, theirs->src_idx),  theirs->capacity};
        } else {
            all_here = 0;
        }
    }
    __syncthreads();

    if (all_here) {
        uint8_t* stage_base = stages + warp * kNumStages * pieces.bytes;
        const int step = static_cast<int>(gridDim.x) * num_warps;
        PieceWalk now(static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x), step, pieces.count);
        PieceWalk ahead = now;
        auto head_of = [&](const PieceWalk& walk) {
            const bool has = walk.row < args.num_tokens && lane < domain.num_ranks;
            return has ? args.send_head[static_cast<int64_t>(walk.row) * domain.num_ranks + lane] : -1;
        };
        auto load = [&](const PieceWalk& walk, int stage) {
            const uint32_t bytes = pieces.size(walk.piece);
            ptx::mbarrier_arrive_expect(&loaded[warp][stage], bytes);
            ptx::bulk_load(stage_base + stage * pieces.bytes,
                           args.rows + walk.row * args.row_bytes + pieces.begin(walk.piece), bytes,
                           &loaded[warp][stage]);
        };
        int32_t head = head_of(now), next_head = -1;
        if (now.row < args.num_tokens && lane == 0) load(now, 0);
        int stage = 0;
        uint32_t parity = 0;
        for (; now.row < args.num_tokens; now.next()) {
            const int next_stage = stage + 1 == kNumStages ? 0 : stage + 1;
            ahead.next();
            next_head = head_of(ahead);
            if (ahead.row < args.num_tokens && lane == 0) {
                // The stage's last store was kNumStages - 1 jobs ago; the groups since may still be reading theirs.
                ptx::bulk_wait_read<kNumStages - 2>();
                load(ahead, next_stage);
            }
            // Rows beyond a fixed capacity are left out; dispatch_notify has told the hosts.
            const bool goes = head >= 0 && head < destinations[min(lane, domain.num_ranks - 1)].capacity;
            const unsigned mask = __ballot_sync(kAllLanes, goes);
            if (now.piece == 0) {
                send_metadata(args, destinations, domain.num_ranks, now.row, head, mask, lane);
            }
            if (lane == 0) {
                while (!ptx::mbarrier_try_wait(&loaded[warp][stage], parity)) {
                }
            }
            const int64_t begin = pieces.begin(now.piece);
            for (unsigned left = mask; left != 0; left &= left - 1) {
                const int peer = __ffs(left) - 1;
                const int64_t row = __shfl_sync(kAllLanes, head, peer);
                if (lane == 0) {
                    ptx::bulk_store(destinations[peer].rows + row * args.row_bytes + begin,
                                    stage_base + stage * pieces.bytes, pieces.size(now.piece));
                }
            }
            if (lane == 0) ptx::bulk_commit();
            head = next_head;
            stage = next_stage;
            if (stage == 0) parity ^= 1;
        }
        if (lane == 0) ptx::bulk_wait_all();
    }
    sync::finish(domain, epoch, Operation::kDispatch);
}

}  // namespace

void launch_dispatch_rows(const DispatchRowsArgs& args, int num_sms, Stream stream) {
    const Pieces pieces = equal_pieces(args.row_bytes, kMaxPieceBytes);
    const int warps = static_cast<int>(std::min(kMaxWarps, kSharedBytes / (kNumStages * pieces.bytes)));
    const int64_t jobs = static_cast<int64_t>(args.num_tokens) * pieces.count;
    check_limit(jobs, INT32_MAX / 2, "dispatch_rows", "the number of pieces of all rows");
    // A block for every few rows at most: few tokens need few SMs.
    const auto blocks =
        static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(num_sms, (jobs + 3) / 4)));
    const auto shared = static_cast<size_t>(warps * kNumStages * pieces.bytes);
    allow_shared_memory(dispatch_rows, kSharedBytes, "dispatch_rows");
    dispatch_rows<<<blocks, warps * 32, shared, static_cast<cudaStream_t>(stream)>>>(args, pieces);
    check_launch("dispatch_rows");
}

}  // namespace deep_ep
