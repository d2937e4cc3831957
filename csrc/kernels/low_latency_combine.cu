#include <algorithm>

#include "kernels/low_latency_launch.h"
#include "layout/elements.cuh"
#include "layout/expert_range.h"
#include "ptx/grid.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"
#include "sync/low_latency.cuh"

namespace deep_ep {
namespace {

constexpr int kNumWarps = 16;
constexpr int kNumThreads = kNumWarps * 32;
constexpr int kPerVector = 8;
constexpr int kVectors = kStepBytes / (32 * 16);  // of a lane in a step
constexpr int kRowsAhead = 4;                     // rows of a step that a lane loads before it sums them
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr auto kKind = LowLatencyKind::kCombine;
using Vec = Pack<uint16_t, kPerVector>;

// What a block knows of the peers, in shared memory.
struct Peers {
    sync::Came came[kMaxPeers];  // whether rows may be sent there, and are expected from there
    int num_tokens[kMaxPeers];
    int num_placed[kMaxPeers];  // tokens whose positions are known
    RowPieces cut[kMaxPeers];
    sync::LongestWaits waits;
};

struct Run {
    uint64_t epoch;
    int set;
    int num_local;  // experts
    bool begins, ends;
    // Rows leave in the send part, by their positions, before any home was heard. Those for the own tokens leave with them,
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

// The lane's vector of a step, as an index into a row.
__device__ __forceinline__ int vector_of(int step, int v) {
    return (step * kVectors + v) * 32 + static_cast<int>(threadIdx.x % 32);
}

// What dispatch noted of a source's token and its k-th selection, -1 for nothing. num_placed: tokens that it placed.
__device__ __forceinline__ int32_t position_of(const LowLatencyCombineArgs& args, int source, int num_placed,
                                               int token, int k) {
    if (token >= num_placed) return -1;
    const int64_t first = (static_cast<int64_t>(source) * args.num_max_tokens + token) * args.num_topk;
    return args.positions[first + k];
}

// The row that an expert made of a source's token, null if there is none. position: of that selection; what is noted for
// another expert, or beyond its rows, does not count.
__device__ const uint8_t* locate(const LowLatencyCombineArgs& args, int source, int token, int expert,
                                 int32_t position) {
    const int num_ranks = args.ll.domain.num_ranks, capacity = num_ranks * args.num_max_tokens;
    const auto row_at = [&](int row) {
        return args.x + (static_cast<int64_t>(expert) * capacity + row) * args.hidden * 2;
    };
    if (position >= 0 && position_expert(position) == expert && position_row(position) < capacity) {
        return row_at(position_row(position));
    }
    // A source's rows lie in ascending order of its tokens.
    const int64_t range = args.layout_range[static_cast<int64_t>(expert) * num_ranks + source];
    const int begin = static_cast<int>(range >> 32), end = begin + static_cast<int>(range & 0xFFFFFFFF);
    const int32_t* tokens = args.src_info + static_cast<int64_t>(expert) * capacity;
    int low = begin, high = end;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (tokens[middle] < token) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < end && tokens[low] == token ? row_at(low) : nullptr;
}

// Adds the rows at `mask`, each times its weight, in ascending order; `row` and `weight` are those of the lane. Products
// and sums are single FP32 operations.
__device__ __forceinline__ void add_weighted(float (&sum)[kVectors][kPerVector], unsigned mask,
                                             const uint8_t* row, float weight, int step, int num_vectors) {
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

// Writes sums as bf16, with one pattern for every NaN.
__device__ __forceinline__ void write_sums(Vec* out, const float (&sum)[kVectors][kPerVector], int step,
                                           int num_vectors) {
    VectorRounder<Bf16, kPerVector> rounder;
    Vec result[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) result[v] = rounder.round(sum[v]);
    if (rounder.saw_nan()) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) result[v] = rounder.settle(result[v]);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (vector_of(step, v) < num_vectors) out[vector_of(step, v)] = result[v];
    }
}

// By one block of a home: tells each rank which of its experts a token selected, and the weights.
__device__ void send_selections(const LowLatencyCombineArgs& args, const Run& op, const RowPieces& cut,
                                Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    const int num_ranks = ll.domain.num_ranks, rank = ll.domain.rank;
    const int peer = static_cast<int>(threadIdx.x);
    const bool is_peer = peer < num_ranks && peer != rank;
    const int count = args.num_tokens * args.num_topk, stride = static_cast<int>(blockDim.x);
    int i = static_cast<int>(threadIdx.x);
    // Loaded one ahead, and the first before anything is waited for.
    int64_t next_expert = i < count ? selection(args, i) : -1;
    float next_weight = i < count ? args.topk_weights[i] : 0.0f;
    if (is_peer) peers.came[peer] = sync::await_room(ll, kKind, op.epoch, peer, peers.waits);
    __syncthreads();
    for (; i < count; i += stride) {
        const int64_t given = next_expert;
        const float weight = next_weight;
        if (i + stride < count) {
            next_expert = selection(args, i + stride);
            next_weight = args.topk_weights[i + stride];
        }
        const int expert = existing(args, given);
        if (expert < 0 && given != -1) {
            sync::report(ll.domain, DeviceError::kExpertRange, Operation::kCombine, Phase::kLayout,
                         i % args.num_topk, i / args.num_topk, static_cast<uint64_t>(given));
        }
        const int owner = expert < 0 ? -1 : rank_of_expert(expert, args.num_experts, num_ranks);
        const int local = expert < 0 ? -1 : expert - expert_range(args.num_experts, num_ranks, owner).first;
        for (int to = 0; to < num_ranks; ++to) {
            if (to == rank || peers.came[to] != sync::Came::kHere) continue;
            uint8_t* region = ll.region[to];
            reinterpret_cast<int32_t*>(region + ll.layout.combine_entries(op.set, rank))[i] =
                to == owner ? local : -1;
            if (to != owner) continue;
            reinterpret_cast<float*>(region + ll.layout.combine_weights(op.set, rank))[i] = weight;
        }
    }
    __syncthreads();
    if (is_peer && peers.came[peer] == sync::Came::kHere) {
        sync::publish_header(ll, kKind, peer, op.epoch,
                             {op.epoch, args.signature, args.num_tokens, cut.count, cut.bytes});
    }
    // Before the block asks anew.
    __syncthreads();
}

// Learns what each rank wants back, or, in the send part, only whether rows may be sent there.
__device__ void meet_peers(const LowLatencyCombineArgs& args, const Run& op, const RowPieces& cut,
                           Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    const int peer = static_cast<int>(threadIdx.x), rank = ll.domain.rank;
    if (peer < ll.domain.num_ranks) {
        sync::Came came = sync::await_room(ll, kKind, op.epoch, peer, peers.waits);
        const int num_placed = args.positions != nullptr ? args.source_tokens[peer] : 0;
        peers.num_placed[peer] = min(num_placed, args.num_max_tokens);
        peers.num_tokens[peer] = op.sends_early ? peers.num_placed[peer] : 0;
        peers.cut[peer] = cut;
        if (op.ends && peer != rank && came == sync::Came::kHere) {
            came = sync::await_header(ll, kKind, peer, op.epoch, args.signature, peers.waits);
            if (came == sync::Came::kHere) {
                const LowLatencyHeader* header = sync::header_at(ll, kKind, peer, rank, op.epoch);
                // Within bounds whatever it says, as after a bug that a test planted.
                peers.num_tokens[peer] = min(header->num_tokens, args.num_max_tokens);
                peers.cut[peer] = {min(max(header->num_pieces, 1), kMaxRowPieces),
                                   max(header->piece_bytes, kStepBytes)};
            }
        }
        peers.came[peer] = came;
    }
    __syncthreads();
}

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

// Sums what this rank's experts made of a token of `home`, and sends one piece of it there.
__device__ __forceinline__ void send_partial(const LowLatencyCombineArgs& args, const Run& op,
                                             const RowPieces& cut, int home, int num_placed, int token,
                                             int piece) {
    const LowLatencyDomain& ll = args.ll;
    const LowLatencyLayout& layout = ll.layout;
    const int rank = ll.domain.rank, k = static_cast<int>(threadIdx.x % 32), num_vectors = args.hidden / 8;
    const uint8_t* own = ll.region[rank];
    int expert = -1;
    int32_t position = -1;
    float weight = 0.0f;
    if (k < args.num_topk) {
        const int at = token * args.num_topk + k;
        expert = reinterpret_cast<const int32_t*>(own + layout.combine_entries(op.set, home))[at];
        // Meaningless for selections of other ranks; loaded at once all the same.
        weight = reinterpret_cast<const float*>(own + layout.combine_weights(op.set, home))[at];
        position = position_of(args, home, num_placed, token, k);
    }
    if (expert >= op.num_local) expert = -1;  // only after a bug that a test planted
    if (__ballot_sync(kAllLanes, expert >= 0) == 0) return;
    const uint8_t* row = expert >= 0 ? locate(args, home, token, expert, position) : nullptr;
    // Without a row there is nothing to add, but the home waits for an answer.
    const unsigned mask = __ballot_sync(kAllLanes, row != nullptr);
    auto* to = reinterpret_cast<Vec*>(ll.region[home] + layout.combine_slot(op.set, token, rank));
    const Steps steps(cut, piece, num_vectors);
    for (int step = steps.first; step < steps.end; ++step) {
        float sum[kVectors][kPerVector] = {};
        add_weighted(sum, mask, row, weight, step, num_vectors);
        write_sums(to, sum, step, num_vectors);
    }
    sync::publish_piece(ll, 1u << home, op.epoch,
                        [&](int) { return layout.combine_flag(op.set, token, rank, piece); });
}

// Sends one piece of each row that this rank's experts made of a token of `home`, as they are.
__device__ __forceinline__ void send_unsummed(const LowLatencyCombineArgs& args, const Run& op,
                                              const RowPieces& cut, int home, int num_placed, int token,
                                              int piece) {
    const LowLatencyDomain& ll = args.ll;
    const LowLatencyLayout& layout = ll.layout;
    const int rank = ll.domain.rank, k = static_cast<int>(threadIdx.x % 32), num_vectors = args.hidden / 8;
    int expert = -1;
    int32_t position = -1;
    if (k < args.num_topk) {
        position = position_of(args, home, num_placed, token, k);
        if (op.sends_early) {
            expert = position < 0 ? -1 : position_expert(position);
        } else {
            const uint8_t* entries = ll.region[rank] + layout.combine_entries(op.set, home);
            expert = reinterpret_cast<const int32_t*>(entries)[token * args.num_topk + k];
        }
    }
    if (expert >= op.num_local) expert = -1;
    const unsigned rows = __ballot_sync(kAllLanes, expert >= 0);
    if (rows == 0) return;
    const uint8_t* row = expert >= 0 ? locate(args, home, token, expert, position) : nullptr;
    const Steps steps(cut, piece, num_vectors);
    unsigned left = steps.first < steps.end ? rows : 0;
    int step = steps.first;
    while (left != 0) {
        Vec parts[kRowsAhead][kVectors] = {};
        uint8_t* to[kRowsAhead];
        int steps_at[kRowsAhead], num_loaded = 0;
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            if (left == 0) break;
            const int which = __ffs(left) - 1;
            const auto* from = reinterpret_cast<const Vec*>(
                __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(row), which));
            to[i] = ll.region[home] + layout.combine_slot(op.set, token, which);
            steps_at[i] = step;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                if (from != nullptr && vector_of(step, v) < num_vectors)
                    parts[i][v] = from[vector_of(step, v)];
            }
            num_loaded = i + 1;
            if (++step == steps.end) {
                step = steps.first;
                left &= left - 1;
            }
        }
#pragma unroll
        for (int i = 0; i < kRowsAhead; ++i) {
            if (i >= num_loaded) break;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const int at = vector_of(steps_at[i], v);
                if (at < num_vectors) reinterpret_cast<Vec*>(to[i])[at] = parts[i][v];
            }
        }
    }
    sync::publish_pieces(ll, home, rows, op.epoch,
                         [&](int which) { return layout.combine_flag(op.set, token, which, piece); });
}

// The jobs of this warp among those of all homes: pieces of tokens. Each rank begins with another home.
template <bool kSummed>
__device__ void serve_homes(const LowLatencyCombineArgs& args, const Run& op, const Peers& peers) {
    const int num_ranks = args.ll.domain.num_ranks;
    const int num_homes = op.own_by_slot ? num_ranks : num_ranks - 1;
    const int num_warps = static_cast<int>(gridDim.x) * kNumWarps;
    int job = static_cast<int>(blockIdx.x + threadIdx.x / 32 * gridDim.x);
    for (int i = 0; i < num_homes; ++i) {
        const int home = (args.ll.domain.rank + 1 + i) % num_ranks;
        if (peers.came[home] != sync::Came::kHere) continue;
        const RowPieces cut = peers.cut[home];
        const int num_jobs = peers.num_tokens[home] * cut.count;
        for (; job < num_jobs; job += num_warps) {
            const int token = job / cut.count, piece = job % cut.count;
            if constexpr (kSummed) {
                send_partial(args, op, cut, home, peers.num_placed[home], token, piece);
            } else {
                send_unsummed(args, op, cut, home, peers.num_placed[home], token, piece);
            }
        }
        job -= num_jobs;
    }
}

// Sums one piece of an own token from the ranks' partial sums; `here`: ranks that take part. The own partial sum is made
// while the others travel. False after a failure.
__device__ __forceinline__ bool sum_partials(const LowLatencyCombineArgs& args, const Run& op,
                                             const RowPieces& cut, unsigned here, int token, int piece,
                                             Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    const LowLatencyLayout& layout = ll.layout;
    const int rank = ll.domain.rank, num_ranks = ll.domain.num_ranks, num_placed = peers.num_placed[rank];
    const int k = static_cast<int>(threadIdx.x % 32), num_vectors = args.hidden / 8;
    unsigned owner_bit = 0;
    const uint8_t* row = nullptr;
    float weight = 0.0f;
    if (k < args.num_topk) {
        const int at = token * args.num_topk + k;
        const int expert = existing(args, selection(args, at));
        if (expert >= 0) {
            const int owner = rank_of_expert(expert, args.num_experts, num_ranks);
            owner_bit = 1u << owner;
            if (owner == rank) {
                row =
                    locate(args, rank, token, expert - expert_range(args.num_experts, num_ranks, rank).first,
                           position_of(args, rank, num_placed, token, k));
                weight = args.topk_weights[at];
            }
        }
    }
    unsigned ranks = __reduce_or_sync(kAllLanes, owner_bit) & here;
    const unsigned own_rows = __ballot_sync(kAllLanes, row != nullptr);
    const uint8_t* slots = ll.region[rank] + layout.combine_slot(op.set, token, 0);
    auto* out = reinterpret_cast<Vec*>(args.out + static_cast<int64_t>(token) * args.hidden * 2);
    const Steps steps(cut, piece, num_vectors);
    for (int step = steps.first; step < steps.end; ++step) {
        Vec own[kVectors] = {};
        if (own_rows != 0) {
            float partial[kVectors][kPerVector] = {};
            add_weighted(partial, own_rows, row, weight, step, num_vectors);
            VectorRounder<Bf16, kPerVector> rounder;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) own[v] = rounder.round(partial[v]);
        }
        if (step == steps.first) {
            for (unsigned left = ranks & ~(1u << rank); left != 0; left &= left - 1) {
                const int from = __ffs(left) - 1;
                const int64_t flag = layout.combine_flag(op.set, token, from, piece);
                const sync::Came came = sync::await_piece(ll, kKind, from, flag, op.epoch, peers.waits);
                if (came == sync::Came::kFailed) return false;
                if (came == sync::Came::kMasked) ranks &= ~(1u << from);
            }
        }
        float sum[kVectors][kPerVector] = {};
        for (unsigned left = ranks; left != 0;) {
            Vec parts[kRowsAhead][kVectors] = {};
#pragma unroll
            for (int i = 0; i < kRowsAhead; ++i) {
                if (left == 0) break;
                const int from = __ffs(left) - 1;
                left &= left - 1;
                const auto* slot = reinterpret_cast<const Vec*>(slots + from * layout.slot_bytes);
#pragma unroll
                for (int v = 0; v < kVectors; ++v) {
                    if (from == rank) {
                        parts[i][v] = own[v];
                    } else if (vector_of(step, v) < num_vectors) {
                        parts[i][v] = slot[vector_of(step, v)];
                    }
                }
            }
            // A part that is absent is +0, which changes no sum that began with +0.
#pragma unroll
            for (int i = 0; i < kRowsAhead; ++i) {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) add_vector(sum[v], parts[i][v]);
            }
        }
        write_sums(out, sum, step, num_vectors);
    }
    return true;
}

// Sums one piece of an own token from the experts' rows. False after a failure.
__device__ __forceinline__ bool sum_unsummed(const LowLatencyCombineArgs& args, const Run& op,
                                             const RowPieces& cut, unsigned here, int token, int piece,
                                             Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    const LowLatencyLayout& layout = ll.layout;
    const int rank = ll.domain.rank, num_ranks = ll.domain.num_ranks, num_placed = peers.num_placed[rank];
    const int k = static_cast<int>(threadIdx.x % 32), num_vectors = args.hidden / 8;
    int owner = -1;
    const uint8_t* row = nullptr;
    float weight = 0.0f;
    if (k < args.num_topk) {
        const int at = token * args.num_topk + k;
        const int expert = existing(args, selection(args, at));
        if (expert >= 0) {
            owner = rank_of_expert(expert, args.num_experts, num_ranks);
            weight = args.topk_weights[at];
            if (owner == rank && !op.own_by_slot) {
                row =
                    locate(args, rank, token, expert - expert_range(args.num_experts, num_ranks, rank).first,
                           position_of(args, rank, num_placed, token, k));
            } else if ((here >> owner & 1u) != 0) {
                row = ll.region[rank] + layout.combine_slot(op.set, token, k);
            }
        }
    }
    const bool travels = row != nullptr && (owner != rank || op.own_by_slot);
    for (unsigned left = __ballot_sync(kAllLanes, travels); left != 0; left &= left - 1) {
        const int which = __ffs(left) - 1, from = __shfl_sync(kAllLanes, owner, which);
        const int64_t flag = layout.combine_flag(op.set, token, which, piece);
        const sync::Came came = sync::await_piece(ll, kKind, from, flag, op.epoch, peers.waits);
        if (came == sync::Came::kFailed) return false;
        if (came == sync::Came::kMasked && k == which) row = nullptr;
    }
    const unsigned rows = __ballot_sync(kAllLanes, row != nullptr);
    const unsigned ranks = __reduce_or_sync(kAllLanes, row != nullptr ? 1u << owner : 0u);
    auto* out = reinterpret_cast<Vec*>(args.out + static_cast<int64_t>(token) * args.hidden * 2);
    const Steps steps(cut, piece, num_vectors);
    for (int step = steps.first; step < steps.end; ++step) {
        float sum[kVectors][kPerVector] = {};
        if (args.sum_at_home) {
            add_weighted(sum, rows, row, weight, step, num_vectors);
        } else {
            for (unsigned left = ranks; left != 0; left &= left - 1) {
                const unsigned of_rank = rows & __ballot_sync(kAllLanes, owner == __ffs(left) - 1);
                float partial[kVectors][kPerVector] = {};
                add_weighted(partial, of_rank, row, weight, step, num_vectors);
                VectorRounder<Bf16, kPerVector> rounder;
#pragma unroll
                for (int v = 0; v < kVectors; ++v) add_vector(sum[v], rounder.round(partial[v]));
            }
        }
        write_sums(out, sum, step, num_vectors);
    }
    return true;
}

template <bool kSummed>
__device__ void serve_own_tokens(const LowLatencyCombineArgs& args, const Run& op, const RowPieces& cut,
                                 Peers& peers) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const bool is_here = lane < args.ll.domain.num_ranks &&
                         (lane == args.ll.domain.rank || peers.came[lane] == sync::Came::kHere);
    const unsigned here = __ballot_sync(kAllLanes, is_here);
    const int num_warps = static_cast<int>(gridDim.x) * kNumWarps, num_jobs = args.num_tokens * cut.count;
    bool goes_on = true;
    for (int job = static_cast<int>(blockIdx.x + threadIdx.x / 32 * gridDim.x); goes_on && job < num_jobs;
         job += num_warps) {
        const int token = job / cut.count, piece = job % cut.count;
        if constexpr (kSummed) {
            goes_on = sum_partials(args, op, cut, here, token, piece, peers);
        } else {
            goes_on = sum_unsummed(args, op, cut, here, token, piece, peers);
        }
    }
}

// kSummed: a rank sums what its own experts made of a token before it sends one row. For that it needs the weights, which
// come from the token's home; so where rows are sent before anything can be awaited they travel one by one, as they do
// where the home sums them all.
template <bool kSummed>
__global__ void __launch_bounds__(kNumThreads, 1)
    low_latency_combine(const __grid_constant__ LowLatencyCombineArgs args, const LowLatencyPart part,
                        const RowPieces cut) {
    __shared__ Peers peers;
    const LowLatencyDomain& ll = args.ll;
    if (threadIdx.x < kMaxPeers) peers.waits.ns[threadIdx.x] = 0;
    ptx::wait_for_earlier_kernels();
    const bool has_positions = args.positions != nullptr;
    Run op{};
    op.begins = part != LowLatencyPart::kReceive;
    op.ends = part != LowLatencyPart::kSend;
    op.sends_early = part == LowLatencyPart::kSend && has_positions;
    op.own_by_slot = part != LowLatencyPart::kWhole && has_positions;
    op.epoch = op.begins ? sync::next_epoch(ll, kKind) : *args.ticket;
    op.set = static_cast<int>(op.epoch % kNumSets);
    op.num_local = expert_range(args.num_experts, ll.domain.num_ranks, ll.domain.rank).count;
    __syncthreads();
    if (op.begins && blockIdx.x == 0) {
        if (part == LowLatencyPart::kSend && threadIdx.x == 0) *args.ticket = op.epoch;
        send_selections(args, op, cut, peers);
    }
    if (op.ends || op.sends_early) meet_peers(args, op, cut, peers);
    // Without positions only the homes can tell which row is whose k-th, so the rows leave in the receive part.
    const bool sends_here = part == LowLatencyPart::kReceive ? !has_positions : op.ends || op.sends_early;
    if (sends_here) serve_homes<kSummed>(args, op, peers);
    if (op.ends) {
        serve_own_tokens<kSummed>(args, op, cut, peers);
        sync::finish_receive(ll, kKind, op.epoch, op.begins, peers.waits, args.wait_stats);
    } else {
        sync::finish_send(ll, kKind, op.epoch);
    }
}

// A grid for jobs of about `num_tokens` tokens; few jobs for each block, since latency counts.
unsigned num_blocks(const LowLatencyCombineArgs& args, const RowPieces& cut, int num_sms) {
    // How many tokens the others have is not known here: at least a quarter of what they may have is reckoned with.
    const int64_t tokens = std::max(args.num_tokens, (args.num_max_tokens + 3) / 4);
    const int64_t jobs = tokens * cut.count;
    return static_cast<unsigned>(std::clamp<int64_t>((jobs + 3) / 4, 1, std::max(num_sms, 1)));
}

}  // namespace

void prepare_low_latency_combine() {
    load_kernel(low_latency_combine<false>, "low_latency_combine");
    load_kernel(low_latency_combine<true>, "low_latency_combine");
}

void launch_low_latency_combine(const LowLatencyCombineArgs& given, LowLatencyPart part, int num_sms,
                                Stream stream) {
    LowLatencyCombineArgs args = given;
    constexpr auto* kName = "low_latency_combine";
    check_limit(args.num_topk, args.ll.layout.num_topk, kName, "the number of selections of a token");
    check_limit(args.num_tokens, args.num_max_tokens, kName, "the number of tokens");
    check_limit(2 * static_cast<int64_t>(args.hidden), args.ll.layout.slot_bytes, kName, "the size of a row");
    check_limit(args.num_max_tokens, args.ll.layout.num_max_tokens, kName, "the largest number of tokens");
    if (args.use_logfmt)
        throw std::invalid_argument("deep_ep: low_latency_combine: rows travel as bf16 only");
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const int64_t row_bytes = 2 * static_cast<int64_t>(args.hidden);
    if (part == LowLatencyPart::kWhole && !args.sum_at_home) {
        // Each warp of the other ranks gets one piece, if there are enough.
        const int64_t rows =
            static_cast<int64_t>(std::max(args.num_tokens, 1)) * std::max(args.ll.domain.num_ranks - 1, 1);
        const RowPieces cut = cut_row(row_bytes, static_cast<int64_t>(num_sms) * kNumWarps / rows);
        launch_early(low_latency_combine<true>, num_blocks(args, cut, num_sms), kNumThreads, 0, cuda_stream,
                     kName, args, part, cut);
    } else {
        // Ranks that sum and ranks that do not would wait for each other's flags.
        constexpr uint64_t kUnsummed = 0x5DEECE66D;
        args.signature ^= kUnsummed;
        // All ranks cut alike without having heard of each other.
        constexpr int64_t kPiecesWanted = 2048;
        const RowPieces cut = cut_row(row_bytes, kPiecesWanted / std::max(args.num_max_tokens, 1));
        launch_early(low_latency_combine<false>, num_blocks(args, cut, num_sms), kNumThreads, 0, cuda_stream,
                     kName, args, part, cut);
    }
}

}  // namespace deep_ep
