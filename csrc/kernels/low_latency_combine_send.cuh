// Low-latency combine, the rank of the experts: sums rows of a token, and sends them home.
#pragma once

#include "kernels/low_latency_combine.cuh"

namespace deep_ep::ll_combine {

// Says in the lines of a sum that its rows came in slots. A call, as it is rare.
__device__ __noinline__ inline void say_apart(const LowLatencyDomain& ll, int home, int64_t lines_at,
                                              int step, uint64_t epoch) {
    sync::release_to_lines(ll, home, epoch);
    send_step({{}, kRowsApart}, ll.region[home] + lines_at, step, epoch, static_cast<int>(threadIdx.x % 32));
}

// A piece that a warp has stored at a home without saying so yet: its fence waits for the link, and meanwhile the rows of the
// next piece can be loaded and summed.
struct UnsaidPiece {
    int home = -1, token, piece;
    unsigned rows;  // of the token at the home

    __device__ __forceinline__ void say(const LowLatencyDomain& ll, const Run& op) {
        if (home < 0) return;
        sync::publish_pieces(ll, home, rows, op.epoch,
                             [&](int which) { return ll.layout.combine_flag(op.set, token, which, piece); });
        home = -1;
    }
};

// What a home told of a token: the lane's selection, -1 for one of another rank. False if it no longer matters.
__device__ __forceinline__ bool await_selections(const LowLatencyCombineArgs& args, const Run& op, int home,
                                                 int token, UnsaidPiece& unsaid, int& expert, float& weight) {
    const LowLatencyDomain& ll = args.ll;
    const int k = static_cast<int>(threadIdx.x % 32);
    const uint8_t* at = ll.region[ll.domain.rank] + ll.layout.combine_selections(op.set, home) +
                        (static_cast<int64_t>(token) * args.num_topk + k) * kPacketBytes;
    uint4 packet{};
    const auto try_once = [&] {
        packet = sync::peek_packet(at);
        return sync::is_here(packet, op.epoch);
    };
    const bool is_here = k >= args.num_topk || try_once();
    // One home must not wait for another.
    if (!__all_sync(kAllLanes, is_here)) unsaid.say(ll, op);
    const auto came = sync::wait_by_lanes(ll, kKind, Phase::kPushed, home, op.epoch, is_here, try_once);
    expert = k < args.num_topk ? static_cast<int>(packet.x) : -1;
    if (expert >= op.num_local) expert = -1;  // only after a bug that a test planted
    weight = __uint_as_float(packet.y);
    return came == sync::Came::kHere;
}

// The weight of a selection whose row is summed before its home was heard. A sum times 1 is what it was.
template <bool kBySource>
__device__ __forceinline__ float known_weight(const LowLatencyCombineArgs& args, int source, int token,
                                              int k) {
    if (kBySource) return 1.0f;
    return args.weights[(static_cast<int64_t>(source) * args.num_max_tokens + token) * args.num_topk + k];
}

// Sums what this rank's experts made of a token of `home`, and sends one piece of it there.
template <bool kBySource>
__device__ __forceinline__ void send_partial(const LowLatencyCombineArgs& args, const Run& op,
                                             const RowPieces& cut, bool in_lines, int home, int num_placed,
                                             int token, int piece, UnsaidPiece& unsaid) {
    const LowLatencyDomain& ll = args.ll;
    const LowLatencyLayout& layout = ll.layout;
    const int rank = ll.domain.rank, k = static_cast<int>(threadIdx.x % 32), num_vectors = args.hidden / 8;
    const int32_t position =
        k < args.num_topk ? position_of<kBySource>(args, home, num_placed, token, k, op.num_local) : -1;
    int expert = position < 0 ? -1 : position_expert(position);
    float weight = 0.0f;
    if (!op.sends_early) {
        if (!await_selections(args, op, home, token, unsaid, expert, weight)) return;
    } else if (expert >= 0) {
        weight = known_weight<kBySource>(args, home, token, k);
    }
    if (__ballot_sync(kAllLanes, expert >= 0) == 0) return;
    const uint8_t* row = expert >= 0 ? locate<kBySource>(args, home, token, expert, position) : nullptr;
    // Without a row there is nothing to add, but the home waits for an answer.
    const unsigned mask = distinct<kBySource>(__ballot_sync(kAllLanes, row != nullptr));
    const Steps steps(cut, piece, num_vectors);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; ++step) {
        float sum[kVectors][kPerVector] = {};
        add_weighted(sum, mask, row, weight, step, num_vectors);
        const Rounded partial(sum);
        unsaid.say(ll, op);
        if (in_lines) {
            uint8_t* to = ll.region[home] + layout.combine_lines(op.set, token, rank);
            send_step(partial.step(), to, step, op.epoch, k);
        } else {
            partial.write(reinterpret_cast<Vec*>(ll.region[home] + layout.combine_slot(op.set, token, rank)),
                          step, num_vectors);
        }
    }
    if (in_lines) return;
    unsaid = {home, token, piece, 1u << rank};
}

// How long a warp of a send part lets homes tell what they want before rows leave as they are. Ranks that begin at the same
// time hear of one another within it, and a sum is a fraction of the bytes of its rows; one that comes later costs no more.
constexpr uint64_t kGraceNs = 2000;

struct Grace {
    uint64_t until_ns = 0;  // 0: not needed yet

    // One answer for all lanes.
    __device__ __forceinline__ bool is_over() {
        const uint64_t now = ptx::globaltimer_ns();
        if (until_ns == 0) until_ns = now + kGraceNs;
        return __any_sync(kAllLanes, now >= until_ns);
    }
};

// Steps of rows that a block has under way in place of sums. Few, since the link carries them all, even if the home is heard a
// moment later: with all warps at once a rank that began early made the other one late for the next operation, and so on.
//
// A wait for them ends: warps that have some wait for their own stores only, then give them back. They order nothing.
struct ApartRows {
    static constexpr int kOfDevice = 1024, kOfBlock = 8;
    int* under_way;

    // Whether `count` more may leave. By all lanes of a warp, one answer.
    __device__ __forceinline__ bool take(int count) const {
        const int most = max(kOfBlock, kOfDevice / static_cast<int>(gridDim.x));
        int before = 0;
        if (threadIdx.x % 32 == 0) {
            before = atomicAdd(under_way, count);
            if (before != 0 && before + count > most) atomicAdd(under_way, -count);
        }
        before = __shfl_sync(kAllLanes, before, 0);
        return before == 0 || before + count <= most;
    }
    __device__ __forceinline__ void give_back(int count) const {
        if (threadIdx.x % 32 == 0) atomicAdd(under_way, -count);
    }
};

// What the lane's selection of a token is, if it can be told by now: of an own token what the caller passes, of another what
// has come from its home. Else nothing, and the answer is false.
__device__ __forceinline__ bool peek_selection(const LowLatencyCombineArgs& args, const CombinePlan& plan,
                                               const Run& op, int home, int token, int& expert,
                                               float& weight) {
    const LowLatencyDomain& ll = args.ll;
    const int rank = ll.domain.rank, k = static_cast<int>(threadIdx.x % 32);
    expert = -1;
    if (k >= args.num_topk) return true;
    const int at = token * args.num_topk + k;
    if (home == rank) {
        if (token >= args.num_tokens) return false;
        const int given = existing(args, selection(args, at));
        if (given >= 0 && plan.experts.owner(given) == rank) expert = given - plan.experts.first(rank);
        weight = args.topk_weights[at];
        return true;
    }
    const uint4 packet = sync::peek_packet(ll.region[rank] + ll.layout.combine_selections(op.set, home) +
                                           int64_t{at} * kPacketBytes);
    if (!sync::is_here(packet, op.epoch)) return false;
    expert = static_cast<int>(packet.x);
    weight = __uint_as_float(packet.y);
    return true;
}

// Sends one piece of what this rank's experts made of a token of `home`: of each row, as they are or in LogFMT-10. In
// kSumsInTime a step of their sum, if it is known by now what the home wants; else lines in its place tell of the rows.
template <Form kForm, bool kBySource>
__device__ __forceinline__ void send_unsummed(const LowLatencyCombineArgs& args, const CombinePlan& plan,
                                              const Run& op, const RowPieces& cut, int home, int num_placed,
                                              int token, int piece, UnsaidPiece& unsaid, Grace& grace,
                                              const ApartRows& apart) {
    const LowLatencyDomain& ll = args.ll;
    const LowLatencyLayout& layout = ll.layout;
    const int k = static_cast<int>(threadIdx.x % 32), num_vectors = args.hidden / 8;
    // Looked at first, as it takes the longest.
    const bool peeks = kForm == Form::kSumsInTime && op.sends_early;
    int wanted = -1;
    float weight = 0.0f;
    bool is_told = peeks && peek_selection(args, plan, op, home, token, wanted, weight);
    const int32_t position =
        k < args.num_topk ? position_of<kBySource>(args, home, num_placed, token, k, op.num_local) : -1;
    int expert = position < 0 ? -1 : position_expert(position), num_apart = 0;
    bool sums = kForm == Form::kSumsInTime;
    if (!op.sends_early) {
        if (!await_selections(args, op, home, token, unsaid, expert, weight)) return;
    } else if (peeks && __any_sync(kAllLanes, expert >= 0)) {
        while (!__all_sync(kAllLanes, is_told) && home != ll.domain.rank) {
            if (grace.is_over()) {
                num_apart = __popc(__ballot_sync(kAllLanes, expert >= 0));
                if (apart.take(num_apart)) break;
                num_apart = 0;
            }
            is_told = peek_selection(args, plan, op, home, token, wanted, weight);
        }
        // An expert that dispatch did not note would have to be looked up.
        sums = __all_sync(kAllLanes, is_told && (wanted < 0 || wanted == expert));
        if (sums) expert = wanted;
    }
    if (expert >= op.num_local) expert = -1;
    const unsigned rows = distinct<kBySource>(__ballot_sync(kAllLanes, expert >= 0));
    if (rows == 0) return;
    const uint8_t* row = expert >= 0 ? locate<kBySource>(args, home, token, expert, position) : nullptr;
    if (kForm == Form::kSumsInTime && sums) {
        // Without a row there is nothing to add, but the home waits for an answer.
        const unsigned mask = __ballot_sync(kAllLanes, row != nullptr);
        float sum[kVectors][kPerVector] = {};
        add_weighted(sum, mask, row, weight, piece, num_vectors);
        uint8_t* to = ll.region[home] + layout.combine_lines(op.set, token, ll.domain.rank);
        send_step(Rounded(sum).step(), to, piece, op.epoch, k);
        return;
    }
    const Steps steps(cut, piece, num_vectors);
    unsigned left = steps.first < steps.end ? rows : 0;
    int step = steps.first;
    if constexpr (kForm == Form::kLogFmt) {
        logfmt::store_rows(rows, row, steps.first, steps.end, args.hidden, [&](int which) {
            return ll.region[home] + layout.combine_slot(op.set, token, which);
        });
        left = 0;
    }
#pragma unroll 1
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
        unsaid.say(ll, op);
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
    if constexpr (kForm == Form::kSumsInTime) {
        say_apart(ll, home, layout.combine_lines(op.set, token, ll.domain.rank), piece, op.epoch);
        if (num_apart != 0) apart.give_back(num_apart);
    } else {
        unsaid.say(ll, op);
        unsaid = {home, token, piece, rows};
        if constexpr (kForm == Form::kLogFmt) unsaid.say(ll, op);
    }
}

// The jobs of a worker among those of all homes: pieces of tokens. Each rank begins with another home. Returns the worker's
// first job beyond them.
template <Form kForm, bool kBySource>
__device__ int serve_homes(const LowLatencyCombineArgs& args, const CombinePlan& plan, const Run& op,
                           Peers& peers, const Workers& workers) {
    int job = workers.index;
    UnsaidPiece unsaid;
    Grace grace;
    const ApartRows apart{&peers.apart_under_way};
    const int num_ranks = args.ll.domain.num_ranks;
    const int num_homes = op.own_by_slot ? num_ranks : num_ranks - 1;
    // The own tokens last, as they do not take the link. In kSumsInTime first, while the others tell what they want.
    const int first = op.own_by_slot && kForm == Form::kSumsInTime ? 0 : 1;
#pragma unroll 1
    for (int i = 0; i < num_homes; ++i) {
        const int next = args.ll.domain.rank + first + i, home = next < num_ranks ? next : next - num_ranks;
        // Whether or not they are served, all blocks count the same jobs.
        const bool serves = peers.came[home] == sync::Came::kHere;
        // In kSumsInTime all are alike, whatever a home says.
        const RowPieces cut = kForm == Form::kSumsInTime ? plan.cut : peers.cut[home];
        const SmallDivider& by_pieces = kForm == Form::kSumsInTime ? plan.by_pieces : peers.by_pieces[home];
        const int num_jobs = peers.num_tokens[home] * cut.count;
#pragma unroll 1
        for (; job < num_jobs; job += workers.count) {
            if (!serves) continue;
            const int token = by_pieces.quotient(job), piece = job - token * cut.count;
            if constexpr (kForm == Form::kSums) {
                send_partial<kBySource>(args, op, cut, peers.in_lines[home], home, peers.num_placed[home],
                                        token, piece, unsaid);
            } else {
                send_unsummed<kForm, kBySource>(args, plan, op, cut, home, peers.num_placed[home], token,
                                                piece, unsaid, grace, apart);
            }
        }
        job -= num_jobs;
    }
    unsaid.say(args.ll, op);
    return job;
}

}  // namespace deep_ep::ll_combine
