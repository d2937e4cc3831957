// Low-latency combine, the rank of the experts: sums rows of a token, and sends them home.
#pragma once

#include "kernels/low_latency_combine.cuh"

namespace deep_ep::ll_combine {

// A piece that a warp has stored at a home without saying so yet: its fence waits for the link, and meanwhile the rows of the
// next piece can be loaded and summed.
struct UnsaidPiece {
    int home = -1;
    int64_t flag_at = 0;

    __device__ __forceinline__ void say(const LowLatencyDomain& ll, uint64_t epoch) {
        if (home < 0) return;
        const int64_t at = flag_at;
        sync::publish_piece(ll, 1u << home, epoch, [&](int) { return at; });
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
    if (!__all_sync(kAllLanes, is_here)) unsaid.say(ll, op.epoch);
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
        unsaid.say(ll, op.epoch);
        if (in_lines) {
            uint8_t* to = ll.region[home] + layout.combine_lines(op.set, token, rank);
            send_step(partial.step(), to, step, op.epoch, k);
        } else {
            partial.write(reinterpret_cast<Vec*>(ll.region[home] + layout.combine_slot(op.set, token, rank)),
                          step, num_vectors);
        }
    }
    if (in_lines) return;
    unsaid.home = home;
    unsaid.flag_at = layout.combine_flag(op.set, token, rank, piece);
}

// Sends one piece of each row that this rank's experts made of a token of `home`, as they are or in LogFMT-10.
template <bool kLogFmt, bool kBySource>
__device__ __forceinline__ void send_unsummed(const LowLatencyCombineArgs& args, const Run& op,
                                              const RowPieces& cut, int home, int num_placed, int token,
                                              int piece) {
    const LowLatencyDomain& ll = args.ll;
    const LowLatencyLayout& layout = ll.layout;
    const int k = static_cast<int>(threadIdx.x % 32), num_vectors = args.hidden / 8;
    const int32_t position =
        k < args.num_topk ? position_of<kBySource>(args, home, num_placed, token, k, op.num_local) : -1;
    int expert = position < 0 ? -1 : position_expert(position);
    float unused;
    UnsaidPiece none;
    if (!op.sends_early && !await_selections(args, op, home, token, none, expert, unused)) return;
    if (expert >= op.num_local) expert = -1;
    const unsigned rows = distinct<kBySource>(__ballot_sync(kAllLanes, expert >= 0));
    if (rows == 0) return;
    const uint8_t* row = expert >= 0 ? locate<kBySource>(args, home, token, expert, position) : nullptr;
    const Steps steps(cut, piece, num_vectors);
    unsigned left = steps.first < steps.end ? rows : 0;
    int step = steps.first;
    if constexpr (kLogFmt) {
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

// The jobs of a worker among those of all homes: pieces of tokens. Each rank begins with another home. Returns the worker's
// first job beyond them.
template <bool kSummed, bool kLogFmt, bool kBySource>
__device__ int serve_homes(const LowLatencyCombineArgs& args, const Run& op, const Peers& peers,
                           const Workers& workers) {
    int job = workers.index;
    UnsaidPiece unsaid;
    const int num_ranks = args.ll.domain.num_ranks;
    const int num_homes = op.own_by_slot ? num_ranks : num_ranks - 1;
#pragma unroll 1
    for (int i = 0; i < num_homes; ++i) {
        const int next = args.ll.domain.rank + 1 + i, home = next < num_ranks ? next : next - num_ranks;
        // Whether or not they are served, all blocks count the same jobs.
        const bool serves = peers.came[home] == sync::Came::kHere;
        const RowPieces cut = peers.cut[home];
        const int num_jobs = peers.num_tokens[home] * cut.count;
#pragma unroll 1
        for (; job < num_jobs; job += workers.count) {
            if (!serves) continue;
            const int token = peers.by_pieces[home].quotient(job), piece = job - token * cut.count;
            if constexpr (kSummed) {
                send_partial<kBySource>(args, op, cut, peers.in_lines[home], home, peers.num_placed[home],
                                        token, piece, unsaid);
            } else {
                send_unsummed<kLogFmt, kBySource>(args, op, cut, home, peers.num_placed[home], token, piece);
            }
        }
        job -= num_jobs;
    }
    unsaid.say(args.ll, op.epoch);
    return job;
}

}  // namespace deep_ep::ll_combine
