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
constexpr int kNumStages = 2;
// 7 vectors of 16 bytes a lane: a row of 14,336 bytes is four pieces.
constexpr int kVectorsPerLane = 7;
constexpr int kPieceBytes = kVectorsPerLane * 32 * 16;
constexpr int kStageBytes = 2 * kPieceBytes;  // rows are summed in pairs, as long as there are two
constexpr int kSharedBytes = kMaxWarps * kNumStages * kStageBytes;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Waits for all peers, and finds where the rows and weights of each lie. By all threads of a block; the same answer for all.
__device__ bool await_sources(const CombineRowsArgs& args, uint64_t epoch, const uint8_t** sources,
                              const float** weights, unsigned* pushed_by) {
    const Domain& domain = args.domain;
    const int num_ranks = domain.num_ranks, rank = domain.rank, peer = static_cast<int>(threadIdx.x);
    bool here = true;
    if (peer < num_ranks) {
        here = sync::await_announcement(domain, peer, epoch, args.signature, Operation::kCombine);
        if (here && peer == rank) {
            sources[peer] = args.rows;
            weights[peer] = args.weights;
        } else if (here) {
            const Announcement* theirs = sync::announcement(domain, peer, rank, epoch);
            weights[peer] = reinterpret_cast<const float*>(domain.base[peer] + theirs->topk_weights);
            if (theirs->rows >= 0) {
                sources[peer] = domain.base[peer] + theirs->rows;
            } else {
                // The inbox holds what each other rank received from this one, so the sources' rows lie one after another;
                // a source counts its rows from its own first one, whoever they belong to.
                auto from_here = [&](int at) {
                    const int32_t upto = args.rank_prefix[rank * num_ranks + at];
                    return upto - (rank > 0 ? args.rank_prefix[(rank - 1) * num_ranks + at] : 0);
                };
                int64_t first = rank > 0 ? -args.rank_prefix[(rank - 1) * num_ranks + peer] : 0;
                for (int before = 0; before < peer; ++before) {
                    if (before != rank) first += from_here(before);
                }
                sources[peer] = args.inbox + first * args.hidden * element_bytes(args.type);
                atomicOr(pushed_by, 1u << peer);
            }
        }
    }
    return __syncthreads_and(here) != 0;
}

// What a warp reads ahead of its sums. A job is a token, or one piece of it; lane r knows the token's row at rank r.
struct ReadAhead {
    PieceWalk job;
    int piece, end;       // of the job
    unsigned mask, left;  // ranks that have the token, and those of this piece that are still to be read
    const uint8_t* from;  // in lane r: the row at rank r
    const uint8_t* first_two[2];  // the rows at the lowest two ranks of the mask, in all lanes
    int32_t row;                  // in lane r: its number there
    int32_t next_head;            // the same for the job after, fetched early
    uint64_t arrived;             // in lane r: how far rank r has pushed its rows
    int num_read;                 // pairs
    bool is_broken;               // a peer did not push its rows: nothing more is read
};

template <class Type, int kPerVector>
using Vector = Pack<typename Type::Storage, kPerVector>;

__device__ __forceinline__ const uint8_t* from_lane(const uint8_t* pointer, int lane) {
    return reinterpret_cast<const uint8_t*>(
        __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(pointer), lane));
}

template <class Type, int kPerVector>
__device__ __forceinline__ void add(float (&sum)[kPerVector], const Vector<Type, kPerVector>& part) {
    float values[kPerVector];
    widen_vector<Type, kPerVector>(part, values);
#pragma unroll
    for (int i = 0; i < kPerVector; ++i) sum[i] = __fadd_rn(sum[i], values[i]);
}

// kAtMostTwo: no token has more than two rows, and there is no bias, so no sums have to be kept in registers.
template <class Type, bool kAtMostTwo>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    combine_rows(const __grid_constant__ CombineRowsArgs args, const Pieces pieces, const int job_pieces) {
    constexpr int kPerVector = 16 / sizeof(typename Type::Storage);
    using Vec = Vector<Type, kPerVector>;
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ uint64_t loaded[kMaxWarps][kNumStages];
    __shared__ const uint8_t* sources[kMaxPeers];
    __shared__ const float* weights[kMaxPeers];
    __shared__ unsigned pushed_by;  // ranks whose rows come into the inbox
    const Domain& domain = args.domain;
    const int num_ranks = domain.num_ranks, num_warps = static_cast<int>(blockDim.x / 32);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const uint64_t epoch = sync::own_control(domain)->epoch + 1;

    if (blockIdx.x == 0 && threadIdx.x < num_ranks) {
        // Released here: the rows, which earlier kernels of this stream wrote.
        const int peer = static_cast<int>(threadIdx.x);
        Announcement* message = sync::open_announcement(domain, peer, epoch);
        message->signature = args.signature;
        message->rows = args.rows_offset;
        message->topk_weights = args.weights_offset;
        sync::publish(domain, peer, epoch);
        if (args.push_number != 0) sync::open_inbox(domain, peer, args.push_number);
    }
    if (lane == 0) {
        for (int stage = 0; stage < kNumStages; ++stage) ptx::mbarrier_init(&loaded[warp][stage], 1);
        ptx::fence_mbarrier_init();
    }
    if (threadIdx.x == 0) pushed_by = 0;
    __syncthreads();
    const bool all_here = await_sources(args, epoch, sources, weights, &pushed_by);
    // The rows were acquired by generic loads; bulk copies read them through another proxy.
    ptx::fence_proxy_async();

    if (all_here) {
        uint8_t* ring = stages + warp * kNumStages * kStageBytes;
        const int num_jobs = (pieces.count + job_pieces - 1) / job_pieces;  // of a token
        const int first = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x);
        const PieceWalk start(first, static_cast<int>(gridDim.x) * num_warps, num_jobs);
        const uint8_t* source = lane < num_ranks ? sources[lane] : nullptr;
        const unsigned pushed = pushed_by;
        auto head_of = [&](const PieceWalk& job) {
            const bool has = job.row < args.num_tokens && lane < num_ranks;
            return has ? args.send_head[static_cast<int64_t>(job.row) * num_ranks + lane] : -1;
        };
        auto first_piece = [&](const PieceWalk& job) { return job.piece * job_pieces; };
        auto end_piece = [&](const PieceWalk& job) {
            return min((job.piece + 1) * job_pieces, pieces.count);
        };

        ReadAhead ahead{start, 0, 0, 0, 0, nullptr, {}, 0, head_of(start), 0, 0, false};
        auto open = [&] {
            ahead.row = ahead.next_head;
            ahead.from = source + ahead.row * pieces.row_bytes;
            ahead.mask = ahead.left = __ballot_sync(kAllLanes, ahead.row >= 0);
            if (kAtMostTwo && ahead.mask != 0) {
                ahead.first_two[0] = from_lane(ahead.from, __ffs(ahead.mask) - 1);
                ahead.first_two[1] = from_lane(ahead.from, 31 - __clz(ahead.mask));
            }
            ahead.piece = first_piece(ahead.job);
            ahead.end = end_piece(ahead.job);
            PieceWalk after = ahead.job;
            after.next();
            ahead.next_head = head_of(after);
        };
        // Lane r has to wait for the rows that rank r pushes.
        auto has_arrived = [&](unsigned pair) {
            bool here = true;
            if ((pair & pushed) >> lane & 1u) {
                const uint64_t wanted = args.push_number << 32 | static_cast<uint64_t>(ahead.row + 1);
                if (ahead.arrived < wanted) ahead.arrived = sync::await_pushed(domain, lane, wanted);
                here = ahead.arrived >= wanted;
            }
            return __all_sync(kAllLanes, here) != 0;
        };
        // Starts to read the next one or two rows into a stage.
        auto read_next = [&](int stage) {
            while (ahead.left == 0) {
                if (ahead.job.row >= args.num_tokens) return;
                if (ahead.mask != 0 && ++ahead.piece < ahead.end) {
                    ahead.left = ahead.mask;
                } else {
                    ahead.job.next();
                    open();
                }
            }
            const unsigned lower = ahead.left & -ahead.left, rest = ahead.left ^ lower;
            const unsigned upper = rest & -rest, pair = lower | upper;
            if (ahead.is_broken || ((pair & pushed) != 0 && !has_arrived(pair))) {
                ahead.is_broken = true;
                return;
            }
            ahead.left = rest ^ upper;
            ++ahead.num_read;
            const uint8_t* rows[2] = {ahead.first_two[0], ahead.first_two[1]};
            if (!kAtMostTwo) {
                rows[0] = from_lane(ahead.from, __ffs(lower) - 1);
                rows[1] = from_lane(ahead.from, upper != 0 ? __ffs(upper) - 1 : 0);
            }
            if (lane != 0) return;
            const uint32_t bytes = pieces.size(ahead.piece);
            const int64_t begin = pieces.begin(ahead.piece);
            uint8_t* to = ring + stage * kStageBytes;
            uint64_t* barrier = &loaded[warp][stage];
            ptx::mbarrier_arrive_expect(barrier, upper != 0 ? 2 * bytes : bytes);
            ptx::bulk_load(to, rows[0] + begin, bytes, barrier);
            if (upper != 0) ptx::bulk_load(to + kPieceBytes, rows[1] + begin, bytes, barrier);
        };
        if (ahead.job.row < args.num_tokens) {
            open();
            for (int stage = 0; stage < kNumStages; ++stage) read_next(stage);
        }

        int stage = 0, num_summed = 0;
        uint32_t parity = 0;
        // False if the rows of the next pair do not come.
        auto await_pair = [&](int peer) {
            const bool here =
                ahead.num_read != num_summed &&
                sync::await_bulk(domain, &loaded[warp][stage], parity, Operation::kCombine, peer);
            ++num_summed;
            return __all_sync(kAllLanes, here) != 0;
        };
        auto next_stage = [&] {
            // All lanes have read the stage before it is filled again.
            __syncwarp();
            read_next(stage);
            if (++stage == kNumStages) {
                stage = 0;
                parity ^= 1;
            }
        };
        // One piece of a token whose rows lie at `mask`. kFull: all vectors of all lanes exist, as in most pieces.
        auto sum_piece = [&](auto full, int64_t begin, int num_vectors, unsigned mask) {
            constexpr bool kFull = decltype(full)::value;
            auto* out = reinterpret_cast<Vec*>(args.out + begin);
            auto exists = [&](int v) { return kFull || v * 32 + lane < num_vectors; };
            VectorRounder<Type, kPerVector> rounder;
            auto write = [&](Vec(&vectors)[kVectorsPerLane]) {
                if (rounder.saw_nan()) {
#pragma unroll
                    for (int v = 0; v < kVectorsPerLane; ++v) vectors[v] = rounder.settle(vectors[v]);
                }
#pragma unroll
                for (int v = 0; v < kVectorsPerLane; ++v) {
                    if (exists(v)) out[v * 32 + lane] = vectors[v];
                }
            };
            if constexpr (kAtMostTwo) {
                Vec lower[kVectorsPerLane] = {}, upper[kVectorsPerLane] = {};
                if (mask != 0) {
                    if (!await_pair(__ffs(mask) - 1)) return false;
                    const auto* rows = reinterpret_cast<const Vec*>(ring + stage * kStageBytes) + lane;
                    const bool has_two = (mask & (mask - 1)) != 0;
#pragma unroll
                    for (int v = 0; v < kVectorsPerLane; ++v) {
                        if (exists(v)) lower[v] = rows[v * 32];
                        if (has_two && exists(v)) upper[v] = rows[kPieceBytes / 16 + v * 32];
                    }
                    next_stage();
                }
#pragma unroll
                for (int v = 0; v < kVectorsPerLane; ++v) {
                    // An absent row is +0, which changes no sum that began with +0.
                    lower[v] = rounder.sum_of_two(lower[v], upper[v]);
                }
                write(lower);
                return true;
            }
            float sum[kVectorsPerLane][kPerVector] = {};
            for (int b = 0; b < args.num_biases; ++b) {
                const auto* bias = reinterpret_cast<const Vec*>(args.biases[b] + begin) + lane;
#pragma unroll
                for (int v = 0; v < kVectorsPerLane; ++v) {
                    if (exists(v)) add<Type>(sum[v], bias[v * 32]);
                }
            }
            for (unsigned left = mask; left != 0; left &= left - 1) {
                if (!await_pair(__ffs(left) - 1)) return false;
                const auto* rows = reinterpret_cast<const Vec*>(ring + stage * kStageBytes) + lane;
#pragma unroll
                for (int v = 0; v < kVectorsPerLane; ++v) {
                    if (exists(v)) add<Type>(sum[v], rows[v * 32]);
                }
                left &= left - 1;
                // Keeps the loads below from being moved up: registers hold one row beside the sums.
                __syncwarp();
                if (left != 0) {
#pragma unroll
                    for (int v = 0; v < kVectorsPerLane; ++v) {
                        if (exists(v)) add<Type>(sum[v], rows[kPieceBytes / 16 + v * 32]);
                    }
                }
                next_stage();
                if (left == 0) break;
            }
            Vec result[kVectorsPerLane];
#pragma unroll
            for (int v = 0; v < kVectorsPerLane; ++v) result[v] = rounder.round(sum[v]);
            write(result);
            return true;
        };
        int32_t next_head = head_of(start);
        bool goes_on = true;
        for (PieceWalk job = start; goes_on && job.row < args.num_tokens;) {
            const unsigned mask = __ballot_sync(kAllLanes, next_head >= 0);
            const int end = end_piece(job);
            const int64_t row_begin = job.row * pieces.row_bytes;
            int piece = first_piece(job);
            job.next();
            next_head = head_of(job);
            for (; goes_on && piece < end; ++piece) {
                const int64_t begin = row_begin + pieces.begin(piece);
                const int num_vectors = static_cast<int>(pieces.size(piece)) / 16;
                goes_on = num_vectors == kPieceBytes / 16
                              ? sum_piece(std::true_type{}, begin, num_vectors, mask)
                              : sum_piece(std::false_type{}, begin, num_vectors, mask);
            }
        }
        // After a failure, what was asked for must not arrive in shared memory that is another block's by then.
        for (; !goes_on && num_summed < ahead.num_read; ++num_summed) {
            sync::await_bulk(domain, &loaded[warp][num_summed % kNumStages], num_summed / kNumStages % 2,
                             Operation::kCombine, domain.rank);
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
    const Pieces pieces = equal_pieces(row_bytes, kPieceBytes);
    // Whole tokens cost fewer instructions; with few of them their pieces go to different warps.
    const bool many = args.num_tokens >= 8 * num_sms * kMaxWarps;
    const int64_t jobs = static_cast<int64_t>(args.num_tokens) * (many ? 1 : pieces.count);
    check_limit(jobs, INT32_MAX / 2, "combine_rows", "the number of pieces of all rows");
    const auto blocks =
        static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(num_sms, (jobs + 3) / 4)));
    auto* const kernel = args.num_biases == 0 && args.domain.num_ranks <= 2 ? combine_rows<Type, true>
                                                                            : combine_rows<Type, false>;
    kernel<<<blocks, kMaxWarps * 32, kSharedBytes, stream>>>(args, pieces, many ? pieces.count : 1);
    check_launch("combine_rows");
}

}  // namespace

void prepare_combine_rows() {
    for (auto* kernel : {combine_rows<Bf16, true>, combine_rows<Bf16, false>, combine_rows<Fp16, true>,
                         combine_rows<Fp16, false>, combine_rows<Fp32, true>, combine_rows<Fp32, false>}) {
        allow_shared_memory(kernel, kSharedBytes, "combine_rows");
    }
}

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
