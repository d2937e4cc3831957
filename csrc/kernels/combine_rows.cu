#include <algorithm>

#include "kernels/peer_launch.h"
#include "layout/elements.cuh"
#include "layout/piece_walk.h"
#include "ptx/bulk_copy.cuh"
#include "ptx/grid.cuh"
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
        here = sync::await_announcement(domain, peer, epoch, Operation::kCombine);
        const sync::Terms theirs = sync::terms(domain, peer, epoch);
        here = here && sync::agrees(domain, peer, args.signature, theirs.signature, Operation::kCombine);
        if (here && peer == rank) {
            sources[peer] = args.rows;
            weights[peer] = args.weights;
        } else if (here) {
            weights[peer] = reinterpret_cast<const float*>(domain.base[peer] + theirs.topk_weights);
            if (theirs.rows >= 0) {
                sources[peer] = domain.base[peer] + theirs.rows;
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

// How the rows of this rank's tokens are shared out: a job is a token, or some pieces of it, one job a warp in turn.
struct Jobs {
    const CombineRowsArgs& args;
    const Pieces& pieces;
    int job_pieces;
    int lane;

    __device__ __forceinline__ PieceWalk first(int warp, int num_warps) const {
        const int number = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x);
        return {number, static_cast<int>(gridDim.x) * num_warps,
                (pieces.count + job_pieces - 1) / job_pieces};
    }
    __device__ __forceinline__ int first_piece(const PieceWalk& job) const { return job.piece * job_pieces; }
    __device__ __forceinline__ int end_piece(const PieceWalk& job) const {
        return min((job.piece + 1) * job_pieces, pieces.count);
    }
    // In lane r: the token's row at rank r, or -1.
    __device__ __forceinline__ int32_t head(const PieceWalk& job) const {
        const bool has = job.row < args.num_tokens && lane < args.domain.num_ranks;
        return has ? args.send_head[static_cast<int64_t>(job.row) * args.domain.num_ranks + lane] : -1;
    }
};

// What a warp reads ahead of its sums: the rows of a piece in pairs, each pair into one stage.
// kAtMostTwo: no token has more than two rows.
template <bool kAtMostTwo>
struct ReadAhead {
    const Jobs& jobs;
    uint8_t* ring;          // the warp's stages
    uint64_t* loaded;       // and their barriers
    const uint8_t* source;  // in lane r: the rows of rank r
    unsigned pushed;        // ranks whose rows come into the inbox
    PieceWalk job;
    int32_t next_head;                 // of the job after, fetched early
    int piece = 0, end = 0;            // of the job
    unsigned mask = 0;                 // ranks that have the token
    unsigned left = 0;                 // those whose piece is still to be read
    const uint8_t* from = nullptr;     // in lane r: the row at rank r
    const uint8_t* first_two[2] = {};  // the rows at the lowest two ranks of the mask, in all lanes
    int32_t row = 0;                   // in lane r: its number there
    uint64_t arrived = 0;              // in lane r: how far rank r has pushed its rows
    int num_read = 0;                  // pairs
    bool is_broken = false;            // a peer did not push its rows: nothing more is read

    __device__ __forceinline__ void open() {
        row = next_head;
        from = source + row * jobs.pieces.row_bytes;
        mask = left = __ballot_sync(kAllLanes, row >= 0);
        if (kAtMostTwo && mask != 0) {
            first_two[0] = from_lane(from, __ffs(mask) - 1);
            first_two[1] = from_lane(from, 31 - __clz(mask));
        }
        piece = jobs.first_piece(job);
        end = jobs.end_piece(job);
        PieceWalk after = job;
        after.next();
        next_head = jobs.head(after);
    }

    // Lane r has to wait for the rows that rank r pushes.
    __device__ __forceinline__ bool has_arrived(unsigned pair) {
        bool here = true;
        if ((pair & pushed) >> jobs.lane & 1u) {
            const uint64_t wanted = jobs.args.push_number << 32 | static_cast<uint64_t>(row + 1);
            if (arrived < wanted) arrived = sync::await_pushed(jobs.args.domain, jobs.lane, wanted);
            here = arrived >= wanted;
        }
        return __all_sync(kAllLanes, here) != 0;
    }

    // Starts to read the next one or two rows into a stage.
    __device__ __forceinline__ void read_next(int stage) {
        while (left == 0) {
            if (job.row >= jobs.args.num_tokens) return;
            if (mask != 0 && ++piece < end) {
                left = mask;
            } else {
                job.next();
                open();
            }
        }
        const unsigned lower = left & -left, rest = left ^ lower;
        const unsigned upper = rest & -rest, pair = lower | upper;
        if (is_broken || ((pair & pushed) != 0 && !has_arrived(pair))) {
            is_broken = true;
            return;
        }
        left = rest ^ upper;
        ++num_read;
        const uint8_t* rows[2] = {first_two[0], first_two[1]};
        if (!kAtMostTwo) {
            rows[0] = from_lane(from, __ffs(lower) - 1);
            rows[1] = from_lane(from, upper != 0 ? __ffs(upper) - 1 : 0);
        }
        if (jobs.lane != 0) return;
        const uint32_t bytes = jobs.pieces.size(piece);
        const int64_t begin = jobs.pieces.begin(piece);
        uint8_t* to = ring + stage * kStageBytes;
        ptx::mbarrier_arrive_expect(&loaded[stage], upper != 0 ? 2 * bytes : bytes);
        ptx::bulk_load(to, rows[0] + begin, bytes, &loaded[stage]);
        if (upper != 0) ptx::bulk_load(to + kPieceBytes, rows[1] + begin, bytes, &loaded[stage]);
    }

    __device__ __forceinline__ void start() {
        if (job.row >= jobs.args.num_tokens) return;
        open();
        for (int stage = 0; stage < kNumStages; ++stage) read_next(stage);
    }
};

// Sums pieces in the order in which they are read.
template <class Type, bool kAtMostTwo>
struct Summer {
    static constexpr int kPerVector = 16 / sizeof(typename Type::Storage);
    using Vec = Vector<Type, kPerVector>;

    ReadAhead<kAtMostTwo>& ahead;
    int stage = 0;
    uint32_t parity = 0;
    int num_summed = 0;  // pairs

    // The rows of the next pair, or null if they do not come.
    __device__ __forceinline__ const Vec* await_pair(int peer) {
        const Jobs& jobs = ahead.jobs;
        const bool here =
            ahead.num_read != num_summed &&
            sync::await_bulk(jobs.args.domain, &ahead.loaded[stage], parity, Operation::kCombine, peer);
        ++num_summed;
        if (!__all_sync(kAllLanes, here)) return nullptr;
        return reinterpret_cast<const Vec*>(ahead.ring + stage * kStageBytes) + jobs.lane;
    }

    __device__ __forceinline__ void next_stage() {
        // All lanes have read the stage before it is filled again.
        __syncwarp();
        ahead.read_next(stage);
        if (++stage == kNumStages) {
            stage = 0;
            parity ^= 1;
        }
    }

    // One piece of a token whose rows lie at `mask`; false if they do not come. kFull: all vectors of all lanes exist, as in
    // most pieces.
    template <bool kFull>
    __device__ __forceinline__ bool sum_piece(int64_t begin, int num_vectors, unsigned mask) {
        const CombineRowsArgs& args = ahead.jobs.args;
        const int lane = ahead.jobs.lane;
        auto exists = [&](int v) { return kFull || v * 32 + lane < num_vectors; };
        VectorRounder<Type, kPerVector> rounder;
        Vec result[kVectorsPerLane] = {};
        if constexpr (kAtMostTwo) {
            if (!sum_two(mask, rounder, exists, result)) return false;
        } else {
            float sum[kVectorsPerLane][kPerVector] = {};
            for (int b = 0; b < args.num_biases; ++b) {
                const auto* bias = reinterpret_cast<const Vec*>(args.biases[b] + begin) + lane;
#pragma unroll
                for (int v = 0; v < kVectorsPerLane; ++v) {
                    if (exists(v)) add<Type>(sum[v], bias[v * 32]);
                }
            }
            if (!sum_all(mask, exists, sum)) return false;
#pragma unroll
            for (int v = 0; v < kVectorsPerLane; ++v) result[v] = rounder.round(sum[v]);
        }
        if (rounder.saw_nan()) {
#pragma unroll
            for (int v = 0; v < kVectorsPerLane; ++v) result[v] = rounder.settle(result[v]);
        }
        auto* out = reinterpret_cast<Vec*>(args.out + begin) + lane;
#pragma unroll
        for (int v = 0; v < kVectorsPerLane; ++v) {
            if (exists(v)) out[v * 32] = result[v];
        }
        return true;
    }

    // No sums are kept: the stage is free again before anything is added.
    template <class Exists>
    __device__ __forceinline__ bool sum_two(unsigned mask, VectorRounder<Type, kPerVector>& rounder,
                                            Exists exists, Vec (&result)[kVectorsPerLane]) {
        Vec upper[kVectorsPerLane] = {};
        if (mask != 0) {
            const Vec* rows = await_pair(__ffs(mask) - 1);
            if (rows == nullptr) return false;
            const bool has_two = (mask & (mask - 1)) != 0;
#pragma unroll
            for (int v = 0; v < kVectorsPerLane; ++v) {
                if (exists(v)) result[v] = rows[v * 32];
                if (has_two && exists(v)) upper[v] = rows[kPieceBytes / 16 + v * 32];
            }
            next_stage();
        }
#pragma unroll
        for (int v = 0; v < kVectorsPerLane; ++v) {
            // An absent row is +0, which changes no sum that began with +0.
            result[v] = rounder.sum_of_two(result[v], upper[v]);
        }
        return true;
    }

    template <class Exists>
    __device__ __forceinline__ bool sum_all(unsigned mask, Exists exists,
                                            float (&sum)[kVectorsPerLane][kPerVector]) {
        while (mask != 0) {
            const Vec* rows = await_pair(__ffs(mask) - 1);
            if (rows == nullptr) return false;
#pragma unroll
            for (int v = 0; v < kVectorsPerLane; ++v) {
                if (exists(v)) add<Type>(sum[v], rows[v * 32]);
            }
            mask &= mask - 1;
            // Keeps the loads below from being moved up: registers hold one row beside the sums.
            __syncwarp();
            if (mask != 0) {
#pragma unroll
                for (int v = 0; v < kVectorsPerLane; ++v) {
                    if (exists(v)) add<Type>(sum[v], rows[kPieceBytes / 16 + v * 32]);
                }
                mask &= mask - 1;
            }
            next_stage();
        }
        return true;
    }

    // After a failure, what was asked for must not arrive in shared memory that is another block's by then.
    __device__ __forceinline__ void drain() {
        const Domain& domain = ahead.jobs.args.domain;
        for (; num_summed < ahead.num_read; ++num_summed) {
            sync::await_bulk(domain, &ahead.loaded[num_summed % kNumStages], num_summed / kNumStages % 2,
                             Operation::kCombine, domain.rank);
        }
    }
};

__device__ void announce_rows(const CombineRowsArgs& args, uint64_t epoch) {
    const int peer = static_cast<int>(threadIdx.x);
    if (peer >= args.domain.num_ranks) return;
    // First of all, since copies wait for it: of the peers' rows and, by this rank's own word, of its rows to the peers.
    if (args.push_number != 0) sync::open_inbox(args.domain, peer, args.push_number);
    // Released here: the rows, which earlier kernels of this stream wrote.
    Announcement* message = sync::open_announcement(args.domain, peer, epoch);
    message->signature = args.signature;
    message->rows = args.rows_offset;
    message->topk_weights = args.weights_offset;
    sync::publish(args.domain, peer, epoch);
}

__device__ void sum_weights(const CombineRowsArgs& args, const float* const* weights) {
    const int num_ranks = args.domain.num_ranks;
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

// kAtMostTwo: no token has more than two rows, and there is no bias.
template <class Type, bool kAtMostTwo>
__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    combine_rows(const __grid_constant__ CombineRowsArgs args, const Pieces pieces, const int job_pieces) {
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ uint64_t loaded[kMaxWarps][kNumStages];
    __shared__ const uint8_t* sources[kMaxPeers];
    __shared__ const float* weights[kMaxPeers];
    __shared__ unsigned pushed_by;  // ranks whose rows come into the inbox
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    if (lane == 0) {
        for (int stage = 0; stage < kNumStages; ++stage) ptx::mbarrier_init(&loaded[warp][stage], 1);
        ptx::fence_mbarrier_init();
    }
    if (threadIdx.x == 0) pushed_by = 0;
    __syncthreads();
    ptx::wait_for_earlier_kernels();
    const uint64_t epoch = sync::own_control(args.domain)->epoch + 1;
    if (blockIdx.x == 0) announce_rows(args, epoch);
    const bool all_here = await_sources(args, epoch, sources, weights, &pushed_by);
    // The rows were acquired by generic loads; bulk copies read them through another proxy.
    ptx::fence_proxy_async();

    if (all_here) {
        const Jobs jobs{args, pieces, job_pieces, lane};
        const PieceWalk first = jobs.first(warp, kMaxWarps);
        ReadAhead<kAtMostTwo> ahead{jobs,
                                    stages + warp * kNumStages * kStageBytes,
                                    loaded[warp],
                                    lane < args.domain.num_ranks ? sources[lane] : nullptr,
                                    pushed_by,
                                    first,
                                    jobs.head(first)};
        ahead.start();
        Summer<Type, kAtMostTwo> summer{ahead};
        int32_t next_head = jobs.head(first);
        bool goes_on = true;
        for (PieceWalk job = first; goes_on && job.row < args.num_tokens;) {
            const unsigned mask = __ballot_sync(kAllLanes, next_head >= 0);
            const int end = jobs.end_piece(job);
            const int64_t row_begin = job.row * pieces.row_bytes;
            int piece = jobs.first_piece(job);
            job.next();
            next_head = jobs.head(job);
            for (; goes_on && piece < end; ++piece) {
                const int64_t begin = row_begin + pieces.begin(piece);
                const int num_vectors = static_cast<int>(pieces.size(piece)) / 16;
                goes_on = num_vectors == kPieceBytes / 16
                              ? summer.template sum_piece<true>(begin, num_vectors, mask)
                              : summer.template sum_piece<false>(begin, num_vectors, mask);
            }
        }
        if (!goes_on) summer.drain();
        if (args.out_weights != nullptr) sum_weights(args, weights);
    }
    sync::finish(args.domain, epoch, Operation::kCombine);
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
    launch_early(kernel, blocks, kMaxWarps * 32, kSharedBytes, stream, "combine_rows", args, pieces,
                 many ? pieces.count : 1);
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
