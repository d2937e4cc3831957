// What the parts of the low-latency combine kernel share: the division of work, and rows and their sums.
#pragma once

#include "kernels/low_latency_launch.h"
#include "kernels/low_latency_logfmt.cuh"
#include "kernels/low_latency_rows.cuh"
#include "layout/elements.cuh"
#include "layout/expert_range.h"
#include "sync/low_latency.cuh"

namespace deep_ep::ll_combine {

constexpr int kNumWarps = 16;
constexpr int kNumThreads = kNumWarps * 32;
constexpr int kPerVector = 8;
constexpr int kPiecesWanted = 2048;               // about the warps of a device
constexpr int kVectors = kStepBytes / (32 * 16);  // of a lane in a step
constexpr int kRowsAhead = 4;                     // rows of a step that a lane loads before it sums them
constexpr int kLineRowsAhead = 2;                 // the same in lines
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr auto kKind = LowLatencyKind::kCombine;
// In a line in place of a sum: the rows of its rank lie in slots, one by one.
constexpr uint32_t kRowsApart = 1;
using Vec = Pack<uint16_t, kPerVector>;

// What a block knows of the peers, in shared memory.
struct Peers {
    uint64_t epoch;
    sync::Came came[kMaxPeers];  // whether rows may be sent there, and are expected from there
    int num_tokens[kMaxPeers];
    int num_placed[kMaxPeers];  // tokens whose positions are known
    RowPieces cut[kMaxPeers];
    SmallDivider by_pieces[kMaxPeers];
    bool in_lines[kMaxPeers];  // rows go there in lines
    uint64_t waited_ns[kMaxPeers];
    int apart_under_way;  // see ApartRows
};

// What a rank sends of the rows that its experts made of a token.
enum class Form {
    kSums,        // their sum, once the weights are known
    kSumsInTime,  // their sum, in lines, if the weights are known in time; else each row
    kRows,        // each row
    kLogFmt,      // each row in LogFMT-10, also to itself
};

// How the host cut the work.
struct CombinePlan {
    LowLatencyPart part;
    bool overlaps;  // see may_overlap
    bool in_lines;  // rows to this rank travel in lines, a step each
    bool is_long;   // some warps sum own tokens while the others send
    RowPieces cut;  // rows to this rank
    ExpertMap experts;
    SmallDivider by_topk, by_pieces;  // selections of a token, pieces of a row to this rank
};

// A row cut into its steps.
DEEP_EP_HOST_DEVICE RowPieces by_steps(int hidden) {
    return {(2 * hidden + kStepBytes - 1) / kStepBytes, kStepBytes};
}

struct Run {
    uint64_t epoch;
    int set;
    int num_local;  // experts
    bool begins, ends;
    bool in_lines;  // rows come in lines, a step each
    // Weights came with the dispatch, or were applied by the caller.
    bool knows_weights;
    // Rows leave by their positions, without waiting for any home. In a send part those for the own tokens leave with them,
    // since x may change before they are summed.
    bool sends_early, own_by_slot;
};

__device__ __forceinline__ int64_t selection(const LowLatencyCombineArgs& args, int i) {
    return args.topk_is_int64 ? static_cast<const int64_t*>(args.topk_idx)[i]
                              : static_cast<const int32_t*>(args.topk_idx)[i];
}

// The selected expert; -1 for none, and for one that does not exist.
__device__ __forceinline__ int existing(const LowLatencyCombineArgs& args, int64_t expert) {
    return expert >= 0 && expert < args.num_experts ? static_cast<int>(expert) : -1;
}

// One block tells what was consumed, and waits the longest. The last one, as block 0 comes late.
__device__ __forceinline__ bool is_leader() {
    return blockIdx.x == gridDim.x - 1;
}

// The lane's vector of a step, as an index into a row.
__device__ __forceinline__ int vector_of(int step, int v) {
    return (step * kVectors + v) * 32 + static_cast<int>(threadIdx.x % 32);
}

// What dispatch noted of a source's token and its k-th selection, below 0 for nothing. num_placed: tokens that it placed.
template <bool kBySource>
__device__ __forceinline__ int32_t position_of(const LowLatencyCombineArgs& args, int source, int num_placed,
                                               int token, int k, int num_local) {
    if (token >= num_placed) return -1;
    const int64_t first = (static_cast<int64_t>(source) * args.num_max_tokens + token) * args.num_topk;
    const int32_t position = args.positions[first + k];
    if (kBySource) return position;
    const bool is_row = position_row(position) < args.ll.domain.num_ranks * args.num_max_tokens;
    return position_expert(position) < num_local && is_row ? position : -1;
}

__device__ __forceinline__ const uint8_t* placed_row(const LowLatencyCombineArgs& args, int32_t position) {
    const int64_t capacity = static_cast<int64_t>(args.ll.domain.num_ranks) * args.num_max_tokens;
    return args.x + (position_expert(position) * capacity + position_row(position)) * args.hidden * 2;
}

// The row that an expert made of a source's token, null if there is none; by source, what all of them made. position: of
// that selection; what is noted for another expert, or beyond its rows, does not count.
template <bool kBySource>
__device__ const uint8_t* locate(const LowLatencyCombineArgs& args, int source, int token, int expert,
                                 int32_t position) {
    const int num_ranks = args.ll.domain.num_ranks, capacity = num_ranks * args.num_max_tokens;
    if (kBySource) {
        return args.x + (static_cast<int64_t>(source) * args.num_max_tokens + token) * args.hidden * 2;
    }
    if (position >= 0 && position_expert(position) == expert) return placed_row(args, position);
    // A source's rows lie in ascending order of its tokens.
    const int64_t range = args.layout_range[static_cast<int64_t>(expert) * num_ranks + source];
    const int begin = static_cast<int>(range >> 32), end = begin + static_cast<int>(range & 0xFFFFFFFF);
    const int32_t* tokens = args.src_info + static_cast<int64_t>(expert) * capacity;
    int low = begin, high = end;
#pragma unroll 1
    while (low < high) {
        const int middle = (low + high) / 2;
        if (tokens[middle] < token) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < end && tokens[low] == token ? placed_row(args, pack_position(expert, low)) : nullptr;
}

// Adds the rows at `mask`, each times its weight, in ascending order; `row` and `weight` are those of the lane. Products
// and sums are single FP32 operations.
__device__ __forceinline__ void add_weighted(float (&sum)[kVectors][kPerVector], unsigned mask,
                                             const uint8_t* row, float weight, int step, int num_vectors) {
#pragma unroll 1
    while (mask != 0) {
        Vec parts[kRowsAhead][kVectors] = {};
        float weights[kRowsAhead];
        int num_loaded = 0;
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            if (mask == 0) break;
            const int k = __ffs(mask) - 1;
            mask &= mask - 1;
            weights[i] = __shfl_sync(kAllLanes, weight, k);
            const auto* from = reinterpret_cast<const Vec*>(
                __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(row), k));
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                if (vector_of(step, v) < num_vectors) parts[i][v] = from[vector_of(step, v)];
            }
            num_loaded = i + 1;
        }
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            if (i >= num_loaded) break;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                float wide[kPerVector];
                widen_vector<Bf16, kPerVector>(parts[i][v], wide);
#pragma unroll
                for (int c = 0; c < kPerVector; ++c) {
                    sum[v][c] = __fadd_rn(sum[v][c], __fmul_rn(wide[c], weights[i]));
                }
            }
        }
    }
}

__device__ __forceinline__ void add_vector(float (&sum)[kPerVector], const Vec& part) {
    float wide[kPerVector];
    widen_vector<Bf16, kPerVector>(part, wide);
#pragma unroll
    for (int c = 0; c < kPerVector; ++c) sum[c] = __fadd_rn(sum[c], wide[c]);
}

// Sums as bf16, with one pattern for every NaN.
struct Rounded {
    Vec v[kVectors];

    __device__ __forceinline__ explicit Rounded(const float (&sum)[kVectors][kPerVector]) {
        VectorRounder<Bf16, kPerVector> rounder;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) v[i] = rounder.round(sum[i]);
        if (rounder.saw_nan()) {
#pragma unroll
            for (int i = 0; i < kVectors; ++i) v[i] = rounder.settle(v[i]);
        }
    }
    __device__ __forceinline__ void write(Vec* out, int step, int num_vectors) const {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (vector_of(step, i) < num_vectors) out[vector_of(step, i)] = v[i];
        }
    }
    __device__ __forceinline__ RowStep step() const {
        static_assert(kVectors == 2);
        return {{*reinterpret_cast<const uint4*>(&v[0]), *reinterpret_cast<const uint4*>(&v[1])}, 0};
    }
};

// The steps of a piece of a row.
struct Steps {
    int first, end;
    __device__ Steps(const RowPieces& cut, int piece, int num_vectors) {
        const int per_piece = cut.bytes / kStepBytes;
        const int all = (num_vectors * 16 + kStepBytes - 1) / kStepBytes;
        first = piece * per_piece;
        end = min(first + per_piece, all);
    }
};

// Of the lanes that have a row, those whose rows are summed: by source they all have the same one.
template <bool kBySource>
__device__ __forceinline__ unsigned distinct(unsigned rows) {
    return kBySource ? rows & (0u - rows) : rows;
}

// Warps of the grid that share jobs, and which of them this one is.
struct Workers {
    int index, count;
};

}  // namespace deep_ep::ll_combine
