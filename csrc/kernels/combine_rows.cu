#include <algorithm>
#include <type_traits>

#include "kernels/peer_launch.h"
#include "layout/elements.cuh"
#include "layout/piece_walk.h"
#include "ptx/bulk_copy.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"
#include "sync/exchange.cuh"

namespace deep_ep {
namespace {

constexpr int kMaxWarps = 14;
constexpr int kNumStages = 4;
// 7 vectors of 16 bytes a lane: a row of 14,336 bytes is four pieces.
constexpr int kVectorsPerLane = 7;
constexpr int kPieceBytes = kVectorsPerLane * 32 * 16;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Walks over the (piece, source rank) pairs that a warp has to read, in the order in which they are summed.
struct Cursor {
    PieceWalk walk;
    unsigned mask;      // ranks of the token that are still to come
    int32_t head;       // in lane r: the token's row at rank r
    int32_t next_head;  // the same for the piece after, fetched early
};

template <class Type>
__global__ void __launch_bounds__(kMaxWarps * 32)
    combine_rows(const __grid_constant__ CombineRowsArgs args, const Pieces pieces) {
    using Storage = typename Type::Storage;
    constexpr int kPerVector = 16 / sizeof(Storage);
    using Vector = Pack<Storage, kPerVector>;
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ uint64_t loaded[kMaxWarps][kNumStages];
    __shared__ const uint8_t* sources[kMaxPeers];
    __shared__ const float* weights[kMaxPeers];
    __shared__ int all_here;
    const Domain& domain = args.domain;
    const int num_ranks = domain.num_ranks, num_warps = static_cast<int>(blockDim.x / 32);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const uint64_t epoch = sync::own_control(domain)->epoch + 1;

    if (blockIdx.x == 0 && threadIdx.x < num_ranks) {
        // Released here: the rows, which earlier kernels of this stream wrote.
        Announcement* message = sync::announcement(domain, domain.rank, static_cast<int>(threadIdx.x), epoch);
        message->signature = args.signature;
        message->rows = args.rows_offset;
        message->topk_weights = args.weights_offset;
        sync::publish(message, epoch);
    }
    if (lane == 0) {
        for (int stage = 0; stage < kNumStages; ++stage) ptx::mbarrier_init(&loaded[warp][stage], 1);
        ptx::fence_mbarrier_init();
    }
    if (threadIdx.x == 0) all_here = 1;
    __syncthreads();
    if (threadIdx.x < num_ranks) {
        const int peer = static_cast<int>(threadIdx.x);
        if (sync::await_announcement(domain, peer, epoch, args.signature, Operation::kCombine)) {
            const Announcement* theirs = sync::announcement(domain, peer, domain.rank, epoch);
            sources[peer] = domain.base[peer] + theirs->rows;
            weights[peer] = reinterpret_cast<const float*>(domain.base[peer] + theirs->topk_weights);
        } else {
            all_here = 0;
        }
    }
    __syncthreads();
    // The rows were acquired by generic loads; bulk copies read them through another proxy.
    ptx::fence_proxy_async();

    if (all_here) {
        uint8_t* ring = stages + warp * kNumStages * kPieceBytes;
        const int first = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x);
        const PieceWalk start(first, static_cast<int>(gridDim.x) * num_warps, pieces.count);
        auto head_of = [&](const PieceWalk& walk) {
            const bool has = walk.row < args.num_tokens && lane < num_ranks;
            return has ? args.send_head[static_cast<int64_t>(walk.row) * num_ranks + lane] : -1;
        };
        auto open = [&](Cursor& cursor) {
            cursor.head = cursor.next_head;
            cursor.mask = __ballot_sync(kAllLanes, cursor.head >= 0);
            PieceWalk after = cursor.walk;
            after.next();
            cursor.next_head = head_of(after);
        };
        // Reads ahead of the sums by up to kNumStages rows.
        Cursor ahead{start, 0, -1, head_of(start)};
        open(ahead);
        auto read_next = [&](int stage) {
            while (ahead.mask == 0 && ahead.walk.row < args.num_tokens) {
                ahead.walk.next();
                open(ahead);
            }
            if (ahead.walk.row >= args.num_tokens) return;
            const int peer = __ffs(ahead.mask) - 1;
            ahead.mask &= ahead.mask - 1;
            const int64_t row = __shfl_sync(kAllLanes, ahead.head, peer);
            if (lane == 0) {
                const uint32_t bytes = pieces.size(ahead.walk.piece);
                ptx::mbarrier_arrive_expect(&loaded[warp][stage], bytes);
                ptx::bulk_load(ring + stage * kPieceBytes,
                               sources[peer] + row * pieces.row_bytes + pieces.begin(ahead.walk.piece), bytes,
                               &loaded[warp][stage]);
            }
        };
        for (int stage = 0; stage < kNumStages; ++stage) read_next(stage);

        int stage = 0;
        uint32_t parity = 0;
        Cursor now{start, 0, -1, head_of(start)};
        // One (token, piece): kFull where all vectors of all lanes exist, which is what most pieces are.
        auto sum_piece = [&](auto full) {
            constexpr bool kFull = decltype(full)::value;
            const int64_t begin = now.walk.row * pieces.row_bytes + pieces.begin(now.walk.piece);
            const int num_vectors = static_cast<int>(pieces.size(now.walk.piece)) / 16;
            float sum[kVectorsPerLane][kPerVector];
#pragma unroll
            for (int v = 0; v < kVectorsPerLane; ++v) {
#pragma unroll
                for (int i = 0; i < kPerVector; ++i) sum[v][i] = 0.0f;
            }
            auto add = [&](const Vector* row) {
#pragma unroll
                for (int v = 0; v < kVectorsPerLane; ++v) {
                    const int at = v * 32 + lane;
                    if (!kFull && at >= num_vectors) continue;
                    const Vector part = row[at];
#pragma unroll
                    for (int i = 0; i < kPerVector; ++i)
                        sum[v][i] = __fadd_rn(sum[v][i], Type::widen(part.v[i]));
                }
            };
            for (int b = 0; b < args.num_biases; ++b) {
                add(reinterpret_cast<const Vector*>(args.biases[b] + begin));
            }
            for (; now.mask != 0; now.mask &= now.mask - 1) {
                while (!ptx::mbarrier_try_wait(&loaded[warp][stage], parity)) {
                }
                add(reinterpret_cast<const Vector*>(ring + stage * kPieceBytes));
                // All lanes have read the stage before it is filled again.
                __syncwarp();
                read_next(stage);
                if (++stage == kNumStages) {
                    stage = 0;
                    parity ^= 1;
                }
            }
#pragma unroll
            for (int v = 0; v < kVectorsPerLane; ++v) {
                const int at = v * 32 + lane;
                if (!kFull && at >= num_vectors) continue;
                reinterpret_cast<Vector*>(args.out + begin)[at] = round_all<Type, kPerVector>(sum[v]);
            }
        };
        for (; now.walk.row < args.num_tokens; now.walk.next()) {
            open(now);
            if (pieces.size(now.walk.piece) == kPieceBytes) {
                sum_piece(std::true_type{});
            } else {
                sum_piece(std::false_type{});
            }
        }
        if (args.out_weights != nullptr) {
            const int64_t num_weights = static_cast<int64_t>(args.num_tokens) * args.num_topk;
            for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < num_weights;
                 i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
                const int64_t token = i / args.num_topk, k = i % args.num_topk;
                float weight = 0.0f;
                for (int peer = 0; peer < num_ranks; ++peer) {
                    const int64_t row = args.send_head[token * num_ranks + peer];
                    if (row >= 0) weight = __fadd_rn(weight, weights[peer][row * args.num_topk + k]);
                }
                args.out_weights[i] = Fp32::round(weight);
            }
        }
    }
    sync::finish(domain, epoch, Operation::kCombine);
}

template <class Type>
void launch(const CombineRowsArgs& args, int num_sms, cudaStream_t stream) {
    const int64_t row_bytes = args.hidden * static_cast<int64_t>(sizeof(typename Type::Storage));
    const auto num_pieces = static_cast<int>((row_bytes + kPieceBytes - 1) / kPieceBytes);
    const Pieces pieces{row_bytes, kPieceBytes, num_pieces};
    const int64_t jobs = static_cast<int64_t>(args.num_tokens) * num_pieces;
    check_limit(jobs, INT32_MAX / 2, "combine_rows", "the number of pieces of all rows");
    const auto blocks =
        static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(num_sms, (jobs + 3) / 4)));
    constexpr int kShared = kMaxWarps * kNumStages * kPieceBytes;
    allow_shared_memory(combine_rows<Type>, kShared, "combine_rows");
    combine_rows<Type><<<blocks, kMaxWarps * 32, kShared, stream>>>(args, pieces);
    check_launch("combine_rows");
}

}  // namespace

void launch_combine_rows(const CombineRowsArgs& args, int num_sms, Stream stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    switch (args.type) {
        case ElementType::kBf16:
            return launch<Bf16>(args, num_sms, cuda_stream);
        case ElementType::kFp16:
            return launch<Fp16>(args, num_sms, cuda_stream);
        case ElementType::kFp32:
            return launch<Fp32>(args, num_sms, cuda_stream);
    }
}

}  // namespace deep_ep
