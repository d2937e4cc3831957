#include <algorithm>

#include "kernels/row_destinations.cuh"
#include "layout/piece_walk.h"
#include "ptx/bulk_copy.cuh"
#include "ptx/grid.cuh"
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
constexpr int kScales = 2;  // that a lane keeps: 64 of a warp, enough for rows of 8,192 columns
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// What travels beside a row, as far as a lane can keep it: read while rows before it are under way, and once for all ranks.
struct Beside {
    uint32_t scales[kScales];
    Routing routing;
};

__device__ __forceinline__ uint32_t scale_of(const DispatchRowsArgs& args, int64_t token, int64_t column) {
    return reinterpret_cast<const uint32_t*>(
        args.scales)[token * args.scales_token_stride + column * args.scales_stride];
}

__device__ __forceinline__ Beside read_beside(const DispatchRowsArgs& args, int token, int lane) {
    Beside beside{};
    if (args.scales != nullptr && token < args.num_tokens) {
#pragma unroll
        for (int i = 0; i < kScales; ++i) {
            const int column = lane + 32 * i;
            if (column < args.scales_per_token) beside.scales[i] = scale_of(args, token, column);
        }
    }
    beside.routing = read_routing(args, token, lane);
    return beside;
}

// By ordinary stores of the warp.
__device__ void send_beside(const DispatchRowsArgs& args, const Destination* destinations, int token,
                            int32_t head, unsigned mask, const Beside& beside, int lane) {
    for (unsigned left = mask; left != 0; left &= left - 1) {
        const int peer = __ffs(left) - 1;
        const Destination& to = destinations[peer];
        const int64_t row = __shfl_sync(kAllLanes, head, peer);
        if (to.scales != nullptr) {
            uint32_t* scales = reinterpret_cast<uint32_t*>(to.scales) + row * args.scales_per_token;
#pragma unroll
            for (int i = 0; i < kScales; ++i) {
                const int column = lane + 32 * i;
                if (column < args.scales_per_token) scales[column] = beside.scales[i];
            }
            for (int column = lane + 32 * kScales; column < args.scales_per_token; column += 32) {
                scales[column] = scale_of(args, token, column);
            }
        }
        send_routing(args, to, token, row, beside.routing, lane);
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
    if (lane == 0) {
        for (int stage = 0; stage < kNumStages; ++stage) ptx::mbarrier_init(&loaded[warp][stage], 1);
        ptx::fence_mbarrier_init();
    }
    const uint64_t epoch = begin_rows(args);
    if (await_destinations(args, epoch, destinations)) {
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
        if (now.row < args.num_tokens && lane == 0) load(now, 0);
        Beside beside = read_beside(args, now.row, lane), next_beside = beside;
        const bool has_places = await_places(args, epoch);
        int32_t head = has_places ? head_of(now) : -1, next_head = -1;
        int stage = 0;
        uint32_t parity = 0;
        for (; now.row < args.num_tokens; now.next()) {
            const int next_stage = stage + 1 == kNumStages ? 0 : stage + 1;
            ahead.next();
            next_head = has_places ? head_of(ahead) : -1;
            if (ahead.piece == 0) next_beside = read_beside(args, ahead.row, lane);
            if (ahead.row < args.num_tokens && lane == 0) {
                // The stage's last store was kNumStages - 1 jobs ago; the groups since may still be reading theirs.
                ptx::bulk_wait_read<kNumStages - 2>();
                load(ahead, next_stage);
            }
            // Rows beyond a fixed capacity are left out; dispatch_notify has told the hosts.
            const bool goes = head >= 0 && head < destinations[min(lane, domain.num_ranks - 1)].capacity;
            const unsigned mask = __ballot_sync(kAllLanes, goes);
            if (now.piece == 0) send_beside(args, destinations, now.row, head, mask, beside, lane);
            const bool here = lane != 0 || sync::await_bulk(domain, &loaded[warp][stage], parity,
                                                            Operation::kDispatch, domain.rank);
            if (!__all_sync(kAllLanes, here)) break;
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
            beside = next_beside;
            stage = next_stage;
            if (stage == 0) parity ^= 1;
        }
        if (lane == 0) ptx::bulk_wait_all();
    }
    end_rows(args, epoch);
}

}  // namespace

void prepare_dispatch_rows() {
    allow_shared_memory(dispatch_rows, kSharedBytes, "dispatch_rows");
}

void launch_dispatch_rows(const DispatchRowsArgs& args, int num_sms, Stream stream) {
    const Pieces pieces = equal_pieces(args.row_bytes, kMaxPieceBytes);
    const int64_t jobs = static_cast<int64_t>(args.num_tokens) * pieces.count;
    check_limit(jobs, INT32_MAX / 2, "dispatch_rows", "the number of pieces of all rows");
    // A block for every few rows at most: few tokens need few SMs. And no more than fill the link: on Hopper 14 blocks do, and
    // with 16 the copies hinder each other (4,096 bf16 rows on 2 GPUs: 177 us with 14, 201 to 217 us with 16).
    const int64_t most = std::min<int64_t>(args.domain.fills_link, (jobs + 3) / 4);
    const auto blocks = static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(num_sms, most)));
    const int warps = static_cast<int>(std::min(kMaxWarps, kSharedBytes / (kNumStages * pieces.bytes)));
    const auto shared = static_cast<size_t>(warps * kNumStages * pieces.bytes);
    // After dispatch_notify, which lets it start early.
    launch_early(dispatch_rows, blocks, warps * 32, shared, static_cast<cudaStream_t>(stream),
                 "dispatch_rows", args, pieces);
}

}  // namespace deep_ep
