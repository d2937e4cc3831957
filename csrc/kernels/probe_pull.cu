#include <cuda_bf16.h>

#include <algorithm>

#include "kernels/probe_launch.h"
#include "layout/piece_walk.h"
#include "ptx/bulk_copy.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"

namespace deep_ep {
namespace {

constexpr int kMaxWarps = 15;
constexpr int kMaxStages = 8;
constexpr int kMaxSharedBytes = 224 * 1024;

// Both values of a word of two bf16, as FP32: one instruction each.
__device__ __forceinline__ float low(uint32_t word) {
    return __uint_as_float(word << 16);
}
__device__ __forceinline__ float high(uint32_t word) {
    return __uint_as_float(word & 0xFFFF0000u);
}

__device__ __forceinline__ uint32_t bits(__nv_bfloat162 v) {
    return *reinterpret_cast<const uint32_t*>(&v);
}

// Sums of two words. A sum that starts from +0 is never -0; adding +0 to both rounded values at once gives the same.
__device__ __forceinline__ __nv_bfloat162 sum_word(uint32_t a, uint32_t b) {
    const __nv_bfloat162 rounded =
        __floats2bfloat162_rn(__fadd_rn(low(a), low(b)), __fadd_rn(high(a), high(b)));
    return __hadd2_rn(rounded, __nv_bfloat162{__ushort_as_bfloat16(0), __ushort_as_bfloat16(0)});
}

// The instructions give NaN as 0x7FFF; in memory it is 0x7FC0.
__device__ __forceinline__ uint32_t canonical_nan(uint32_t word) {
    const uint32_t first = (word & 0x7FFFu) > 0x7F80u ? 0x7FC0u : word & 0xFFFFu;
    const uint32_t second = (word & 0x7FFF0000u) > 0x7F800000u ? 0x7FC00000u : word & 0xFFFF0000u;
    return first | second;
}

// a[v] += b[v]. NaN is rare, so it is looked for once in all values of a lane.
template <int kCount>
__device__ __forceinline__ void sum_vectors(uint4 (&a)[kCount], const uint4 (&b)[kCount]) {
    __nv_bfloat162 largest{__ushort_as_bfloat16(0), __ushort_as_bfloat16(0)};
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
        const __nv_bfloat162 x = sum_word(a[v].x, b[v].x), y = sum_word(a[v].y, b[v].y),
                             z = sum_word(a[v].z, b[v].z), w = sum_word(a[v].w, b[v].w);
        largest = __hmax2_nan(largest, __hmax2_nan(__hmax2_nan(x, y), __hmax2_nan(z, w)));
        a[v] = {bits(x), bits(y), bits(z), bits(w)};
    }
    if (__hbeq2(largest, largest)) return;
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
        a[v] = {canonical_nan(a[v].x), canonical_nan(a[v].y), canonical_nan(a[v].z), canonical_nan(a[v].w)};
    }
}

struct PullLayout {
    Pieces pieces;
    int stages;
    bool one_polls;
};

// How many threads a block may have, so that all vectors of a lane stay in registers.
constexpr int max_threads(int vectors) {
    return (vectors > 8 ? kMaxWarps / 2 + 1 : kMaxWarps + 1) * 32;
}

template <int kVectors, bool kOwnByBulk, bool kOutByBulk, bool kProducer>
__global__ void __launch_bounds__(max_threads(kVectors))
    probe_pull_rows(const __grid_constant__ ProbePullArgs args, const PullLayout layout) {
    constexpr int kPieceBytes = kVectors * 32 * 16;
    // Vectors whose loads are under way together.
    constexpr int kBatch = kVectors == 14 ? 7 : kVectors;
    // A stage holds the peer's piece and, behind it, the own one; one barrier counts the bytes of both.
    constexpr int kStageBytes = kOwnByBulk ? 2 * kPieceBytes : kPieceBytes;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint64_t loaded[kMaxWarps][kMaxStages];
    __shared__ uint64_t emptied[kMaxWarps][kMaxStages];
    const Pieces& pieces = layout.pieces;
    const int num_stages = layout.stages;
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int num_warps = static_cast<int>(blockDim.x / 32) - (kProducer ? 1 : 0);
    const int step = static_cast<int>(gridDim.x) * num_warps;
    if (lane == 0 && warp < num_warps) {
        for (int stage = 0; stage < num_stages; ++stage) {
            ptx::mbarrier_init(&loaded[warp][stage], 1);
            ptx::mbarrier_init(&emptied[warp][stage], 1);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();

    auto start_of = [&](int of_warp) {
        return PieceWalk(static_cast<int>(blockIdx.x) + of_warp * static_cast<int>(gridDim.x), step,
                         pieces.count);
    };
    auto offset_of = [&](const PieceWalk& walk) {
        return walk.row * pieces.row_bytes + pieces.begin(walk.piece);
    };
    auto load = [&](const PieceWalk& walk, int of_warp, int stage) {
        uint8_t* to = shared + (of_warp * num_stages + stage) * kStageBytes;
        const uint32_t bytes = pieces.size(walk.piece);
        const int64_t at = offset_of(walk);
        uint64_t* barrier = &loaded[of_warp][stage];
        ptx::mbarrier_arrive_expect(barrier, kOwnByBulk ? 2 * bytes : bytes);
        ptx::bulk_load(to, args.peer_rows + at, bytes, barrier);
        if (kOwnByBulk) ptx::bulk_load(to + kPieceBytes, args.own_rows + at, bytes, barrier);
    };

    if (kProducer && warp == num_warps) {
        // Lane w loads for warp w whenever one of its stages is free.
        if (lane < num_warps) {
            PieceWalk ahead = start_of(lane);
            int stage = 0;
            uint32_t parity = 1;  // of the phase before the first: the stages start empty
            while (ahead.row < args.num_rows) {
                if (!ptx::mbarrier_test_wait(&emptied[lane][stage], parity)) continue;
                load(ahead, lane, stage);
                ahead.next();
                if (++stage == num_stages) {
                    stage = 0;
                    parity ^= 1;
                }
            }
        }
        return;
    }

    uint8_t* ring = shared + warp * num_stages * kStageBytes;
    PieceWalk now = start_of(warp);
    PieceWalk ahead = now;  // of lane 0, where the warp loads for itself
    auto refill = [&](int stage) {
        if (kProducer) {
            ptx::mbarrier_arrive(&emptied[warp][stage]);
        } else if (ahead.row < args.num_rows) {
            load(ahead, warp, stage);
            ahead.next();
        }
    };
    if (!kProducer && lane == 0) {
        for (int stage = 0; stage < num_stages; ++stage) refill(stage);
    }
    uint4 own[kVectors];
    auto is_full = [&](const PieceWalk& walk) { return pieces.size(walk.piece) == kPieceBytes; };
    auto fetch_own = [&](const PieceWalk& walk) {
        if (walk.row >= args.num_rows || !is_full(walk)) return;
        const auto* from = reinterpret_cast<const uint4*>(args.own_rows + offset_of(walk));
#pragma unroll
        for (int v = 0; v < kVectors; ++v) own[v] = __ldcg(from + v * 32 + lane);
    };
    if (!kOwnByBulk) fetch_own(now);

    int stage = 0;
    uint32_t parity = 0;
    bool first = true;
    while (now.row < args.num_rows) {
        const int64_t at = offset_of(now);
        const int count = static_cast<int>(pieces.size(now.piece)) / 16;
        uint64_t* barrier = &loaded[warp][stage];
        if (!layout.one_polls || lane == 0) {
            while (!ptx::mbarrier_try_wait(barrier, parity)) {
            }
        }
        if (layout.one_polls) __syncwarp();
        auto* theirs = reinterpret_cast<uint4*>(ring + stage * kStageBytes);
        auto* target = kOutByBulk ? theirs : reinterpret_cast<uint4*>(args.out + at);
        if (is_full(now)) {
#pragma unroll
            for (int begin = 0; begin < kVectors; begin += kBatch) {
                uint4 sums[kBatch], others[kBatch];
#pragma unroll
                for (int v = 0; v < kBatch; ++v) {
                    const int i = (begin + v) * 32 + lane;
                    sums[v] = theirs[i];
                    others[v] = kOwnByBulk ? theirs[kPieceBytes / 16 + i] : own[begin + v];
                }
                if (!kOutByBulk && begin + kBatch == kVectors) {
                    // All lanes have read the stage before it is filled again.
                    __syncwarp();
                    if (lane == 0) refill(stage);
                }
                sum_vectors(sums, others);
#pragma unroll
                for (int v = 0; v < kBatch; ++v) target[(begin + v) * 32 + lane] = sums[v];
            }
        } else {
            // The rest of a row.
            const auto* rest =
                kOwnByBulk ? theirs + kPieceBytes / 16 : reinterpret_cast<const uint4*>(args.own_rows + at);
#pragma unroll 1
            for (int i = lane; i < count; i += 32) {
                uint4 sum[1] = {theirs[i]};
                const uint4 other[1] = {rest[i]};
                sum_vectors(sum, other);
                target[i] = sum[0];
            }
            if (!kOutByBulk) {
                __syncwarp();
                if (lane == 0) refill(stage);
            }
        }
        now.next();
        if (!kOwnByBulk) fetch_own(now);
        if (kOutByBulk) {
            // The sums were written by generic stores; the bulk store reads them through another proxy.
            ptx::fence_proxy_async();
            __syncwarp();
            if (lane == 0) {
                ptx::bulk_store(args.out + at, theirs, count * 16);
                ptx::bulk_commit();
                // The stage before this one has been stored from by now, or is waited for.
                ptx::bulk_wait_read<1>();
                if (!first) refill(stage == 0 ? num_stages - 1 : stage - 1);
            }
            first = false;
        }
        if (++stage == num_stages) {
            stage = 0;
            parity ^= 1;
        }
    }
    if (kOutByBulk && lane == 0) ptx::bulk_wait_all();
}

using Kernel = void (*)(ProbePullArgs, PullLayout);

template <int kVectors>
Kernel choose(const ProbePullShape& shape) {
    const int index = (shape.own_by_bulk ? 4 : 0) + (shape.out_by_bulk ? 2 : 0) + (shape.producer ? 1 : 0);
    switch (index) {
        case 0:
            return probe_pull_rows<kVectors, false, false, false>;
        case 1:
            return probe_pull_rows<kVectors, false, false, true>;
        case 2:
            return probe_pull_rows<kVectors, false, true, false>;
        case 3:
            return probe_pull_rows<kVectors, false, true, true>;
        case 4:
            return probe_pull_rows<kVectors, true, false, false>;
        case 5:
            return probe_pull_rows<kVectors, true, false, true>;
        case 6:
            return probe_pull_rows<kVectors, true, true, false>;
        default:
            return probe_pull_rows<kVectors, true, true, true>;
    }
}

Kernel choose_vectors(const ProbePullShape& shape) {
    switch (shape.vectors) {
        case 4:
            return choose<4>(shape);
        case 7:
            return choose<7>(shape);
        case 8:
            return choose<8>(shape);
        case 14:
            return choose<14>(shape);
        default:
            throw std::invalid_argument("deep_ep: probe_pull_rows: vectors is " +
                                        std::to_string(shape.vectors) + ", expected 4, 7, 8 or 14");
    }
}

}  // namespace

void launch_probe_pull(const ProbePullArgs& args, const ProbePullShape& shape, Stream stream) {
    const Kernel kernel = choose_vectors(shape);
    const int piece_bytes = shape.vectors * 32 * 16;
    const auto num_pieces = static_cast<int>((args.row_bytes + piece_bytes - 1) / piece_bytes);
    const Pieces pieces{args.row_bytes, piece_bytes, num_pieces};
    check_limit(static_cast<int64_t>(args.num_rows) * num_pieces, INT32_MAX / 2, "probe_pull_rows",
                "the number of pieces of all rows");
    const int threads = (shape.warps + (shape.producer ? 1 : 0)) * 32;
    const int shared = shape.warps * shape.stages * piece_bytes * (shape.own_by_bulk ? 2 : 1);
    const bool fits = shape.num_sms >= 1 && shape.warps >= 1 && threads <= max_threads(shape.vectors) &&
                      shape.warps <= kMaxWarps && shape.stages >= 2 && shape.stages <= kMaxStages &&
                      shared <= kMaxSharedBytes;
    if (!fits) {
        throw std::invalid_argument(
            "deep_ep: probe_pull_rows: " + std::to_string(shape.num_sms) + " SMs, " +
            std::to_string(shape.warps) + " warps, " + std::to_string(shape.stages) + " stages, " +
            std::to_string(shared) + " bytes of shared memory; expected at least 1 SM, up to " +
            std::to_string(std::min(max_threads(shape.vectors) / 32 - 1, kMaxWarps)) + " warps, 2 to " +
            std::to_string(kMaxStages) + " stages, at most " + std::to_string(kMaxSharedBytes) + " bytes");
    }
    allow_shared_memory(kernel, kMaxSharedBytes, "probe_pull_rows");
    kernel<<<shape.num_sms, threads, shared, static_cast<cudaStream_t>(stream)>>>(
        args, PullLayout{pieces, shape.stages, shape.one_polls});
    check_launch("probe_pull_rows");
}

}  // namespace deep_ep
