// Low-latency combine, a token's home: sums what the ranks have made of it.
#pragma once

#include "kernels/low_latency_combine.cuh"

namespace deep_ep::ll_combine {

constexpr unsigned kFailedParts = 0xFFFFFFFFu;

// Partial sums of a step by the first kLineRowsAhead ranks of `left`, zeros of one that was masked meanwhile; `own` is this
// rank's. Returns the ranks that remain, kFailedParts after a failure. kMayBeApart: a rank's rows may lie one by one, and this
// rank's do if they did not travel; `apart` gets these ranks, whose parts remain zeros.
template <bool kMayBeApart, int kNumParts>
__device__ __forceinline__ unsigned take_lines(const LowLatencyCombineArgs& args, const Run& op,
                                               unsigned left, int token, int step, const Vec (&own)[kVectors],
                                               Vec (&parts)[kNumParts][kVectors], unsigned& apart) {
    const LowLatencyDomain& ll = args.ll;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int at_hand = op.own_by_slot ? -1 : ll.domain.rank;
    uint8_t* region = ll.region[ll.domain.rank];
    const auto row_of = [&](int from) { return region + ll.layout.combine_lines(op.set, token, from); };
    PeekedStep peeked[kLineRowsAhead];
    int ranks[kLineRowsAhead];
#pragma unroll
    for (int i = 0; i < kLineRowsAhead; ++i) {
        ranks[i] = __ffs(left) - 1;
        left &= left - 1;
        if (ranks[i] >= 0 && ranks[i] != at_hand) peeked[i] = peek_step(row_of(ranks[i]), step, lane);
    }
#pragma unroll
    for (int i = 0; i < kLineRowsAhead; ++i) {
        if (ranks[i] < 0) break;
        if (kMayBeApart && ranks[i] == at_hand) {
            apart |= 1u << ranks[i];
            continue;
        }
        if (ranks[i] == at_hand) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) parts[i][v] = own[v];
            continue;
        }
        const sync::Came came =
            await_step(ll, kKind, ranks[i], op.epoch, row_of(ranks[i]), step, lane, peeked[i]);
        if (came == sync::Came::kFailed) return kFailedParts;
        if (came == sync::Came::kMasked) continue;
        const RowStep part = peeked[i].step(lane);
        if (kMayBeApart && __shfl_sync(kAllLanes, part.scale_word, 0) == kRowsApart) {
            apart |= 1u << ranks[i];
            continue;
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) parts[i][v] = *reinterpret_cast<const Vec*>(&part.halves[v]);
    }
    return left;
}

// The same from slots whose flags have come.
__device__ __forceinline__ unsigned take_slots(const LowLatencyCombineArgs& args, const Run& op,
                                               unsigned left, int token, int step, const Vec (&own)[kVectors],
                                               Vec (&parts)[kRowsAhead][kVectors]) {
    const LowLatencyDomain& ll = args.ll;
    const int at_hand = op.own_by_slot ? -1 : ll.domain.rank;
    const uint8_t* slots = ll.region[ll.domain.rank] + ll.layout.combine_slot(op.set, token, 0);
#pragma unroll
    for (int i = 0; i < kRowsAhead; ++i) {
        if (left == 0) break;
        const int from = __ffs(left) - 1;
        left &= left - 1;
        const auto* slot = reinterpret_cast<const Vec*>(slots + from * ll.layout.slot_bytes);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            if (from == at_hand) {
                parts[i][v] = own[v];
            } else if (vector_of(step, v) < args.hidden / 8) {
                parts[i][v] = slot[vector_of(step, v)];
            }
        }
    }
    return left;
}

// Sums one piece of an own token from the ranks' partial sums; `here`: ranks that take part. The own partial sum is made
// while the others travel. False after a failure.
template <bool kBySource>
__device__ __forceinline__ bool sum_partials(const LowLatencyCombineArgs& args, const CombinePlan& plan,
                                             const Run& op, unsigned here, int token, int piece,
                                             const Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    const LowLatencyLayout& layout = ll.layout;
    const int rank = ll.domain.rank, num_placed = peers.num_placed[rank];
    const int k = static_cast<int>(threadIdx.x % 32), num_vectors = args.hidden / 8;
    unsigned owner_bit = 0;
    const uint8_t* row = nullptr;
    float weight = 0.0f;
    if (k < args.num_topk) {
        const int at = token * args.num_topk + k;
        const int expert = existing(args, selection(args, at));
        if (expert >= 0) {
            const int owner = plan.experts.owner(expert);
            owner_bit = 1u << owner;
            if (owner == rank && !op.own_by_slot) {
                row =
                    locate<kBySource>(args, rank, token, expert - plan.experts.first(rank),
                                      position_of<kBySource>(args, rank, num_placed, token, k, op.num_local));
                weight = kBySource ? 1.0f : args.topk_weights[at];
            }
        }
    }
    unsigned ranks = __reduce_or_sync(kAllLanes, owner_bit) & here;
    const unsigned own_rows = distinct<kBySource>(__ballot_sync(kAllLanes, row != nullptr));
    auto* out = reinterpret_cast<Vec*>(args.out + static_cast<int64_t>(token) * args.hidden * 2);
    const Steps steps(plan.cut, piece, num_vectors);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; ++step) {
        Vec own[kVectors] = {};
        if (own_rows != 0) {
            float partial[kVectors][kPerVector] = {};
            add_weighted(partial, own_rows, row, weight, step, num_vectors);
            VectorRounder<Bf16, kPerVector> rounder;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) own[v] = rounder.round(partial[v]);
        }
        if (!op.in_lines && step == steps.first) {
#pragma unroll 1
            for (unsigned left = op.own_by_slot ? ranks : ranks & ~(1u << rank); left != 0;
                 left &= left - 1) {
                const int from = __ffs(left) - 1;
                const int64_t flag = layout.combine_flag(op.set, token, from, piece);
                const sync::Came came = sync::await_piece(ll, kKind, from, flag, op.epoch);
                if (came == sync::Came::kFailed) return false;
                if (came == sync::Came::kMasked) ranks &= ~(1u << from);
            }
        }
        float sum[kVectors][kPerVector] = {};
#pragma unroll 1
        for (unsigned left = ranks; left != 0;) {
            Vec parts[kRowsAhead][kVectors] = {};
            unsigned none = 0;
            left = op.in_lines ? take_lines<false>(args, op, left, token, step, own, parts, none)
                               : take_slots(args, op, left, token, step, own, parts);
            if (left == kFailedParts) return false;
            // A part that is absent is +0, which changes no sum that began with +0.
#pragma unroll
            for (int i = 0; i < kRowsAhead; ++i) {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) add_vector(sum[v], parts[i][v]);
            }
        }
        Rounded(sum).write(out, step, num_vectors);
    }
    return true;
}

struct PartialStep {
    Vec v[kVectors];
};

// Sums a step of the rows at `mask`, each times its weight, as their rank would have. A call, as it is rare.
__device__ __noinline__ inline PartialStep sum_apart(unsigned mask, const uint8_t* row, float weight,
                                                     int step, int num_vectors) {
    float sum[kVectors][kPerVector] = {};
    add_weighted(sum, mask, row, weight, step, num_vectors);
    PartialStep partial;
    VectorRounder<Bf16, kPerVector> rounder;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) partial.v[v] = rounder.round(sum[v]);
    return partial;
}

// Sums a step of an own token from the ranks' partial sums, or, of ranks that could not make them in time, from their rows.
// owner, row, weight: of the lane's selection; row: where it lies, or would come. False after a failure.
__device__ __forceinline__ bool sum_lines(const LowLatencyCombineArgs& args, const Run& op, int owner,
                                          const uint8_t* row, float weight, int token, int step, Vec* out) {
    const int num_vectors = args.hidden / 8;
    const Vec none[kVectors] = {};
    float sum[kVectors][kPerVector] = {};
#pragma unroll 1
    for (unsigned left = __reduce_or_sync(kAllLanes, row != nullptr ? 1u << owner : 0u); left != 0;) {
        Vec parts[kLineRowsAhead][kVectors] = {};
        unsigned apart = 0, taken = left;
        left = take_lines<true>(args, op, left, token, step, none, parts, apart);
        if (left == kFailedParts) return false;
        taken &= ~left;
        if (apart != 0) sync::acquire_after_lines();
#pragma unroll 1
        for (int i = 0; apart != 0; ++i, taken &= taken - 1) {
            const int from = __ffs(taken) - 1;
            if ((apart >> from & 1u) == 0) continue;
            apart &= apart - 1;
            const unsigned mask = __ballot_sync(kAllLanes, row != nullptr && owner == from);
            const PartialStep partial = sum_apart(mask, row, weight, step, num_vectors);
#pragma unroll
            for (int j = 0; j < kLineRowsAhead; ++j) {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) {
                    if (j == i) parts[j][v] = partial.v[v];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kLineRowsAhead; ++i) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) add_vector(sum[v], parts[i][v]);
        }
    }
    Rounded(sum).write(out, step, num_vectors);
    return true;
}

// Sums one piece of an own token from the experts' rows. False after a failure.
template <Form kForm, bool kBySource>
__device__ __forceinline__ bool sum_unsummed(const LowLatencyCombineArgs& args, const CombinePlan& plan,
                                             const Run& op, unsigned here, int token, int piece,
                                             const Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    const LowLatencyLayout& layout = ll.layout;
    const int rank = ll.domain.rank, num_placed = peers.num_placed[rank];
    const int k = static_cast<int>(threadIdx.x % 32), num_vectors = args.hidden / 8;
    int owner = -1;
    const uint8_t* row = nullptr;
    float weight = 0.0f;
    if (k < args.num_topk) {
        const int at = token * args.num_topk + k;
        const int expert = existing(args, selection(args, at));
        if (expert >= 0) {
            owner = plan.experts.owner(expert);
            weight = kBySource ? 1.0f : args.topk_weights[at];
            if (owner == rank && !op.own_by_slot) {
                row =
                    locate<kBySource>(args, rank, token, expert - plan.experts.first(rank),
                                      position_of<kBySource>(args, rank, num_placed, token, k, op.num_local));
            } else if ((here >> owner & 1u) != 0) {
                row = ll.region[rank] + layout.combine_slot(op.set, token, k);
            }
        }
    }
    if constexpr (kBySource) {
        const unsigned same_rank = __match_any_sync(kAllLanes, owner);
        if (k != __ffs(same_rank) - 1) row = nullptr;
    }
    const bool travels = row != nullptr && (owner != rank || op.own_by_slot);
    auto* out = reinterpret_cast<Vec*>(args.out + static_cast<int64_t>(token) * args.hidden * 2);
    if constexpr (kForm == Form::kSumsInTime)
        return sum_lines(args, op, owner, row, weight, token, piece, out);
    sync::Came came;
    if (!sync::await_pieces(ll, kKind, travels, owner, layout.combine_flag(op.set, token, k, piece), op.epoch,
                            came))
        return false;
    if (came == sync::Came::kMasked) row = nullptr;
    const unsigned rows = __ballot_sync(kAllLanes, row != nullptr);
    const unsigned ranks = __reduce_or_sync(kAllLanes, row != nullptr ? 1u << owner : 0u);
    const unsigned travelled = kForm == Form::kLogFmt ? __ballot_sync(kAllLanes, travels) : 0u;
    const Steps steps(plan.cut, piece, num_vectors);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; ++step) {
        float sum[kVectors][kPerVector] = {};
        if constexpr (kForm == Form::kLogFmt) {
            // All at once or by their ranks, from one place: the code is large.
#pragma unroll 1
            for (unsigned left = args.sum_at_home ? 1u : ranks; left != 0; left &= left - 1) {
                const unsigned of_rank = __ballot_sync(kAllLanes, owner == __ffs(left) - 1);
                float partial[kVectors][kPerVector] = {};
                logfmt::add_rows(partial, args.sum_at_home ? rows : rows & of_rank, travelled, row, weight,
                                 step, args.hidden);
                VectorRounder<Bf16, kPerVector> rounder;
#pragma unroll
                for (int v = 0; v < kVectors; ++v) {
                    if (args.sum_at_home) {
#pragma unroll
                        for (int c = 0; c < kPerVector; ++c) sum[v][c] = partial[v][c];
                    } else {
                        add_vector(sum[v], rounder.round(partial[v]));
                    }
                }
            }
        } else if (args.sum_at_home) {
            add_weighted(sum, rows, row, weight, step, num_vectors);
        } else {
#pragma unroll 1
            for (unsigned left = ranks; left != 0; left &= left - 1) {
                const unsigned of_rank = rows & __ballot_sync(kAllLanes, owner == __ffs(left) - 1);
                float partial[kVectors][kPerVector] = {};
                add_weighted(partial, of_rank, row, weight, step, num_vectors);
                VectorRounder<Bf16, kPerVector> rounder;
#pragma unroll
                for (int v = 0; v < kVectors; ++v) add_vector(sum[v], rounder.round(partial[v]));
            }
        }
        Rounded(sum).write(out, step, num_vectors);
    }
    return true;
}

template <Form kForm, bool kBySource>
__device__ void serve_own_tokens(const LowLatencyCombineArgs& args, const CombinePlan& plan, const Run& op,
                                 const Peers& peers, const Workers& workers) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const bool is_here = lane < args.ll.domain.num_ranks &&
                         (lane == args.ll.domain.rank || peers.came[lane] == sync::Came::kHere);
    const unsigned here = __ballot_sync(kAllLanes, is_here);
    const int num_jobs = args.num_tokens * plan.cut.count;
    bool goes_on = true;
#pragma unroll 1
    for (int job = workers.index; goes_on && job < num_jobs; job += workers.count) {
        const int token = plan.by_pieces.quotient(job), piece = job - token * plan.cut.count;
        if constexpr (kForm == Form::kSums) {
            goes_on = sum_partials<kBySource>(args, plan, op, here, token, piece, peers);
        } else {
            goes_on = sum_unsummed<kForm, kBySource>(args, plan, op, here, token, piece, peers);
        }
    }
}

}  // namespace deep_ep::ll_combine
