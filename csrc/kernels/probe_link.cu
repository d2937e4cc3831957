#include <algorithm>

#include "kernels/probe_checks.h"
#include "kernels/probe_launch.h"
#include "layout/piece_walk.h"
#include "ptx/bulk_copy.cuh"
#include "ptx/memory.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"

namespace deep_ep {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kMaxStages = 8;
constexpr int kMaxBehind = 3;
constexpr int kMaxSharedBytes = 224 * 1024;
constexpr int kFlagThreads = 256;

struct PushLayout {
    Pieces pieces;
    int stages;
    int stage_bytes;
    int ahead;
};

__device__ __forceinline__ void copy_scales(const ProbePushArgs& args, int row, int lane) {
    const int64_t begin = static_cast<int64_t>(row) * args.scale_bytes;
    for (int at = lane * 16; at < args.scale_bytes; at += 32 * 16) {
        const uint4 value = *reinterpret_cast<const uint4*>(args.scales + begin + at);
        *reinterpret_cast<uint4*>(args.peer_scales + begin + at) = value;
        if (args.own_scales != nullptr) *reinterpret_cast<uint4*>(args.own_scales + begin + at) = value;
    }
}

// Each warp takes pieces in turn: a bulk load into a stage, then a bulk store for each place that gets it.
template <int kBehind>
__global__ void __launch_bounds__(kMaxWarps * 32)
    probe_push_rows(const __grid_constant__ ProbePushArgs args, const PushLayout layout) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint64_t loaded[kMaxWarps][kMaxStages];
    const Pieces& pieces = layout.pieces;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    uint8_t* ring = shared + warp * layout.stages * layout.stage_bytes;
    if (lane == 0) {
        for (int stage = 0; stage < layout.stages; ++stage) ptx::mbarrier_init(&loaded[warp][stage], 1);
        ptx::fence_mbarrier_init();
    }
    __syncwarp();

    const int step = static_cast<int>(gridDim.x * (blockDim.x / 32));
    PieceWalk now(static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x), step, pieces.count);
    PieceWalk ahead = now;
    int ahead_stage = 0;
    auto load = [&] {
        if (ahead.row < args.num_rows) {
            uint8_t* to = ring + ahead_stage * layout.stage_bytes;
            const bool scales = args.scales_by_bulk && ahead.piece == 0;
            const uint32_t bytes = pieces.size(ahead.piece);
            uint64_t* barrier = &loaded[warp][ahead_stage];
            ptx::mbarrier_arrive_expect(barrier, bytes + (scales ? args.scale_bytes : 0));
            ptx::bulk_load(to, args.rows + ahead.row * args.row_bytes + pieces.begin(ahead.piece), bytes,
                           barrier);
            if (scales) {
                ptx::bulk_load(to + pieces.bytes,
                               args.scales + static_cast<int64_t>(ahead.row) * args.scale_bytes,
                               args.scale_bytes, barrier);
            }
        }
        ahead.next();
        if (++ahead_stage == layout.stages) ahead_stage = 0;
    };
    if (lane == 0) {
        for (int i = 0; i < layout.ahead; ++i) load();
    }
    int stage = 0;
    uint32_t parity = 0;
    for (; now.row < args.num_rows; now.next()) {
        if (lane == 0) {
            // The stage was stored from kBehind + 1 jobs ago; the groups since may still be reading theirs.
            ptx::bulk_wait_read<kBehind>();
            load();
            while (!ptx::mbarrier_try_wait(&loaded[warp][stage], parity)) {
            }
            const uint8_t* from = ring + stage * layout.stage_bytes;
            const int64_t at = now.row * args.row_bytes + pieces.begin(now.piece);
            const uint32_t bytes = pieces.size(now.piece);
            ptx::bulk_store(args.peer_rows + at, from, bytes);
            if (args.own_rows != nullptr) ptx::bulk_store(args.own_rows + at, from, bytes);
            if (args.scales_by_bulk && now.piece == 0) {
                const int64_t scale_at = static_cast<int64_t>(now.row) * args.scale_bytes;
                ptx::bulk_store(args.peer_scales + scale_at, from + pieces.bytes, args.scale_bytes);
                if (args.own_scales != nullptr) {
                    ptx::bulk_store(args.own_scales + scale_at, from + pieces.bytes, args.scale_bytes);
                }
            }
            ptx::bulk_commit();
        }
        if (args.scales != nullptr && !args.scales_by_bulk && now.piece == 0)
            copy_scales(args, now.row, lane);
        if (++stage == layout.stages) {
            stage = 0;
            parity ^= 1;
        }
    }
    if (lane == 0) ptx::bulk_wait_all();
}

// Around L1: the source may be a peer's.
__global__ void __launch_bounds__(1024)
    probe_register_copy(const uint4* source, uint4* target, int64_t count) {
    constexpr int kUnroll = 8;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + (kUnroll - 1) * step < count; i += kUnroll * step) {
        uint4 value[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) value[u] = __ldcg(source + i + u * step);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) target[i + u * step] = value[u];
    }
    for (; i < count; i += step) target[i] = __ldcg(source + i);
}

// One block. The flag itself is what is measured, so it is read and written here rather than through csrc/sync.
__global__ void __launch_bounds__(kFlagThreads) probe_flags(const __grid_constant__ ProbeFlagsArgs args) {
    // Order: acquires the payload that the peer released with its flag.
    auto await = [&](uint64_t target) {
        int here = 1;
        if (threadIdx.x == 0) {
            const uint64_t start = ptx::globaltimer_ns();
            while (ptx::ld_acquire_sys(args.own_flag) < target) {
                if (ptx::globaltimer_ns() - start > args.timeout_ns) {
                    here = 0;
                    break;
                }
            }
        }
        return __syncthreads_and(here) != 0;
    };
    // Order: the block barrier carries all threads' stores to thread 0, whose fence and flag release them.
    auto send = [&](uint64_t value) {
        for (int64_t at = threadIdx.x * 16; at < args.payload_bytes; at += blockDim.x * 16) {
            *reinterpret_cast<uint4*>(args.peer_payload + at) =
                *reinterpret_cast<const uint4*>(args.payload + at);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            if (args.payload_bytes != 0) ptx::fence_acq_rel_sys();
            ptx::st_release_sys(args.peer_flag, value);
        }
    };
    uint64_t begin = 0, end = 0;
    int round = 0;
    for (; round < args.rounds; ++round) {
        const uint64_t flag = args.first + round;
        if (args.starts) send(flag);
        if (!await(flag)) break;
        if (!args.starts) send(flag);
        end = ptx::globaltimer_ns();
        if (round == 0) begin = end;
    }
    if (threadIdx.x == 0) {
        args.result[0] = end - begin;
        args.result[1] = static_cast<uint64_t>(round);
    }
}

template <int kBehind>
void launch_push(const ProbePushArgs& args, const PushLayout& layout, const ProbePushShape& shape, int shared,
                 cudaStream_t stream) {
    allow_shared_memory(probe_push_rows<kBehind>, kMaxSharedBytes, "probe_push_rows");
    probe_push_rows<kBehind><<<shape.num_sms, shape.warps * 32, shared, stream>>>(args, layout);
    check_launch("probe_push_rows");
}

}  // namespace

void launch_probe_push(const ProbePushArgs& args, const ProbePushShape& shape, Stream stream) {
    check_range(shape.num_sms, 1, 65535, "num_sms");
    check_range(shape.warps, 1, kMaxWarps, "warps");
    check_range(shape.behind, 0, kMaxBehind, "behind");
    check_range(shape.ahead, 1, kMaxStages - 1 - shape.behind, "ahead");
    check_range(shape.piece_bytes, 16, kMaxSharedBytes, "piece_bytes");
    check_multiple(args.row_bytes, 16, "row_bytes");
    check_multiple(args.scale_bytes, 16, "scale_bytes");
    const Pieces pieces = equal_pieces(args.row_bytes, shape.piece_bytes);
    check_limit(static_cast<int64_t>(args.num_rows) * pieces.count, INT32_MAX / 2, "probe_push_rows",
                "the number of pieces of all rows");
    const int stages = shape.ahead + shape.behind + 1;
    const int stage_bytes = (pieces.bytes + (args.scales_by_bulk ? args.scale_bytes : 0) + 127) / 128 * 128;
    const int shared = shape.warps * stages * stage_bytes;
    check_range(shared, 0, kMaxSharedBytes, "warps * stages * piece_bytes");
    const PushLayout layout{pieces, stages, stage_bytes, shape.ahead};
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    switch (shape.behind) {
        case 0:
            return launch_push<0>(args, layout, shape, shared, cuda_stream);
        case 1:
            return launch_push<1>(args, layout, shape, shared, cuda_stream);
        case 2:
            return launch_push<2>(args, layout, shape, shared, cuda_stream);
        default:
            return launch_push<3>(args, layout, shape, shared, cuda_stream);
    }
}

void launch_probe_registers(const ProbeRegistersArgs& args, int num_sms, int warps, Stream stream) {
    check_range(num_sms, 1, 65535, "num_sms");
    check_range(warps, 1, 32, "warps");
    check_multiple(args.bytes, 16, "bytes");
    probe_register_copy<<<num_sms, warps * 32, 0, static_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<const uint4*>(args.source), reinterpret_cast<uint4*>(args.target), args.bytes / 16);
    check_launch("probe_register_copy");
}

void launch_probe_flags(const ProbeFlagsArgs& args, Stream stream) {
    check_range(args.rounds, 2, 1 << 20, "rounds");
    check_multiple(args.payload_bytes, 16, "payload_bytes");
    const int threads = args.payload_bytes == 0 ? 32 : kFlagThreads;
    probe_flags<<<1, threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    check_launch("probe_flags");
}

}  // namespace deep_ep
