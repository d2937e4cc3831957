#include <algorithm>

#include "kernels/low_latency_launch.h"
#include "kernels/low_latency_logfmt.cuh"
#include "kernels/low_latency_rows.cuh"
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
constexpr int kPiecesWanted = 2048;               // about the warps of a device
constexpr int kVectors = kStepBytes / (32 * 16);  // of a lane in a step
constexpr int kRowsAhead = 4;                     // rows of a step that a lane loads before it sums them
constexpr int kPacketRowsAhead = 2;               // the same in packets
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr auto kKind = LowLatencyKind::kCombine;
using Vec = Pack<uint16_t, kPerVector>;

// What a block knows of the peers, in shared memory.
struct Peers {
    uint64_t epoch;
    sync::Came came[kMaxPeers];  // whether rows may be sent there, and are expected from there
    int num_tokens[kMaxPeers];
    int num_placed[kMaxPeers];  // tokens whose positions are known
    RowPieces cut[kMaxPeers];
    SmallDivider by_pieces[kMaxPeers];
    bool packets[kMaxPeers];  // rows go there as packets
    uint64_t waited_ns[kMaxPeers];
};

// How the host cut the work.
struct CombinePlan {
    LowLatencyPart part;
    bool overlaps;  // see may_overlap
    bool packets;   // rows to this rank travel as packets, a step each
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
    bool packets;  // rows come as packets, a step each
    // Weights came with the dispatch, or were applied by the caller.
    bool knows_weights;
    // Rows leave by their positions, before any home was heard. In a send part those for the own tokens leave with them, since
    // x may change before they are summed.
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
__device__ __forceinline__ int32_t position_of(const LowLatencyCombineArgs& args, int source, int num_placed,
                                               int token, int k, int num_local) {
    if (token >= num_placed) return -1;
    const int64_t first = (static_cast<int64_t>(source) * args.num_max_tokens + token) * args.num_topk;
    const int32_t position = args.positions[first + k];
    if (!args.expert_major) return position;
    const bool is_row = position_row(position) < args.ll.domain.num_ranks * args.num_max_tokens;
    return position_expert(position) < num_local && is_row ? position : -1;
}

__device__ __forceinline__ const uint8_t* placed_row(const LowLatencyCombineArgs& args, int32_t position) {
    const int64_t capacity = static_cast<int64_t>(args.ll.domain.num_ranks) * args.num_max_tokens;
    return args.x + (position_expert(position) * capacity + position_row(position)) * args.hidden * 2;
}

// The row that an expert made of a source's token, null if there is none; by source, what all of them made. position: of
// that selection; what is noted for another expert, or beyond its rows, does not count.
__device__ const uint8_t* locate(const LowLatencyCombineArgs& args, int source, int token, int expert,
                                 int32_t position) {
    const int num_ranks = args.ll.domain.num_ranks, capacity = num_ranks * args.num_max_tokens;
    if (!args.expert_major) {
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

// Learns the operation's number, and waits for leave to write. By all threads of a block.
__device__ __forceinline__ void begin_block(const LowLatencyCombineArgs& args, Run& op, Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    if (threadIdx.x < 32) {
        const int peer = static_cast<int>(threadIdx.x);
        const bool is_peer = peer < ll.domain.num_ranks;
        sync::Room room{};
        if (is_peer) room = sync::peek_room(ll, kKind, peer);
        uint64_t epoch = 0;
        if (peer == 0) epoch = op.begins ? sync::begin_operation(ll, kKind) : *args.ticket;
        epoch = __shfl_sync(kAllLanes, epoch, 0);
        if (is_peer) {
            peers.came[peer] = sync::await_room(ll, kKind, epoch, peer, room);
            peers.waited_ns[peer] = 0;
        }
        if (peer == 0) peers.epoch = epoch;
    }
    __syncthreads();
    op.epoch = peers.epoch;
    op.set = static_cast<int>(op.epoch % kNumSets);
}

// By one block of a home, which begins here: tells each rank which of its experts a token selected, and the weights.
__device__ void send_selections(const LowLatencyCombineArgs& args, const CombinePlan& plan, Run& op,
                                Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    const int num_ranks = ll.domain.num_ranks, rank = ll.domain.rank;
    const int count = args.num_tokens * args.num_topk, stride = static_cast<int>(blockDim.x);
    int i = static_cast<int>(threadIdx.x);
    // Loaded one ahead, and the first before anything is waited for.
    int64_t next_expert = i < count ? selection(args, i) : -1;
    float next_weight = i < count && !op.knows_weights ? args.topk_weights[i] : 0.0f;
    begin_block(args, op, peers);
    if (const int peer = i; peer < num_ranks && peer != rank && peers.came[peer] == sync::Came::kHere) {
        sync::publish_header(ll, kKind, peer, op.epoch,
                             {signature_tag(args.signature), args.num_tokens,
                              plan.packets ? 0 : plan.cut.count, plan.cut.bytes / kStepBytes});
    }
    if (op.knows_weights) return;
#pragma unroll 1
    for (; i < count; i += stride) {
        const int64_t given = next_expert;
        const float weight = next_weight;
        if (i + stride < count) {
            next_expert = selection(args, i + stride);
            next_weight = args.topk_weights[i + stride];
        }
        const int expert = existing(args, given);
        if (expert < 0 && given != -1) {
            sync::report_apart(ll.domain, DeviceError::kExpertRange, Operation::kCombine, Phase::kLayout,
                               plan.by_topk.remainder(i), plan.by_topk.quotient(i),
                               static_cast<uint64_t>(given));
        }
        const int owner = expert < 0 ? -1 : plan.experts.owner(expert);
        const int local = expert < 0 ? -1 : expert - plan.experts.first(owner);
        const int64_t at =
            ll.layout.combine_selections(op.set, rank) + static_cast<int64_t>(i) * kPacketBytes;
#pragma unroll 1
        for (int to = 0; to < num_ranks; ++to) {
            if (to == rank || peers.came[to] != sync::Came::kHere) continue;
            sync::send_packet(ll.region[to] + at, op.epoch, static_cast<uint32_t>(to == owner ? local : -1),
                              __float_as_uint(weight), 0);
        }
    }
}

// Learns what each rank wants back, or, in the send part, only what may be sent there. By all threads of a block.
__device__ void meet_peers(const LowLatencyCombineArgs& args, const CombinePlan& plan, const Run& op,
                           Peers& peers) {
    const LowLatencyDomain& ll = args.ll;
    const int peer = static_cast<int>(threadIdx.x), rank = ll.domain.rank;
    if (peer < ll.domain.num_ranks) {
        sync::Came came = peers.came[peer];
        int num_placed = args.positions != nullptr ? args.num_max_tokens : 0;
        if (args.source_tokens != nullptr) num_placed = min(num_placed, args.source_tokens[peer]);
        peers.num_placed[peer] = num_placed;
        peers.num_tokens[peer] = op.sends_early ? peers.num_placed[peer] : 0;
        peers.cut[peer] = plan.cut;
        peers.packets[peer] = op.sends_early && plan.packets;
        if (op.ends && !op.sends_early && peer != rank && came != sync::Came::kFailed) {
            LowLatencyHeader header{};
            if (came == sync::Came::kHere) {
                came = sync::await_header(ll, kKind, peer, op.epoch, args.signature, header,
                                          &peers.waited_ns[peer]);
            }
            if (came != sync::Came::kFailed &&
                sync::decide(ll, kKind, op.epoch, peer, came == sync::Came::kHere)) {
                if (came != sync::Came::kHere) header = sync::read_header(ll, kKind, peer, op.epoch);
                came = sync::Came::kHere;
                // Within bounds whatever it says, as after a bug that a test planted.
                const bool packets = header.num_pieces == 0;
                peers.packets[peer] = packets;
                peers.num_tokens[peer] =
                    min(max(header.num_tokens, 0),
                        packets ? min(ll.layout.packet_tokens, args.num_max_tokens) : args.num_max_tokens);
                peers.cut[peer] = packets ? by_steps(args.hidden)
                                          : RowPieces{min(header.num_pieces, kMaxRowPieces),
                                                      max(header.piece_steps, 1) * kStepBytes};
            } else if (came == sync::Came::kHere) {
                came = sync::Came::kMasked;
            }
        }
        peers.by_pieces[peer] = SmallDivider::of(peers.cut[peer].count);
        peers.came[peer] = came;
    }
    __syncthreads();
}

// By one warp where rows leave before their homes were heard: hears them all the same, to notice one that is in another
// operation, or that refused.
__device__ __forceinline__ void watch_peers(const LowLatencyCombineArgs& args, const Run& op, Peers& peers) {
    const int peer = static_cast<int>(threadIdx.x % 32);
    if (peer < args.ll.domain.num_ranks && peer != args.ll.domain.rank &&
        peers.came[peer] == sync::Came::kHere) {
        LowLatencyHeader header{};
        sync::await_header(args.ll, kKind, peer, op.epoch, args.signature, header, &peers.waited_ns[peer]);
    }
    __syncwarp();
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

// Of the lanes that have a row, those whose rows are summed: by source they all have the same one.
__device__ __forceinline__ unsigned distinct(const LowLatencyCombineArgs& args, unsigned rows) {
    return args.expert_major ? rows : rows & (0u - rows);
}

// The weight of a selection whose row is summed before its home was heard. A sum times 1 is what it was.
__device__ __forceinline__ float known_weight(const LowLatencyCombineArgs& args, int source, int token,
                                              int k) {
    if (!args.expert_major) return 1.0f;
    return args.weights[(static_cast<int64_t>(source) * args.num_max_tokens + token) * args.num_topk + k];
}

// Sums what this rank's experts made of a token of `home`, and sends one piece of it there.
__device__ __forceinline__ void send_partial(const LowLatencyCombineArgs& args, const Run& op,
                                             const RowPieces& cut, bool packets, int home, int num_placed,
                                             int token, int piece, UnsaidPiece& unsaid) {
    const LowLatencyDomain& ll = args.ll;
    const LowLatencyLayout& layout = ll.layout;
    const int rank = ll.domain.rank, k = static_cast<int>(threadIdx.x % 32), num_vectors = args.hidden / 8;
    const int32_t position =
        k < args.num_topk ? position_of(args, home, num_placed, token, k, op.num_local) : -1;
    int expert = position < 0 ? -1 : position_expert(position);
    float weight = 0.0f;
    if (!op.sends_early) {
        if (!await_selections(args, op, home, token, unsaid, expert, weight)) return;
    } else if (expert >= 0) {
        weight = known_weight(args, home, token, k);
    }
    if (__ballot_sync(kAllLanes, expert >= 0) == 0) return;
    const uint8_t* row = expert >= 0 ? locate(args, home, token, expert, position) : nullptr;
    // Without a row there is nothing to add, but the home waits for an answer.
    const unsigned mask = distinct(args, __ballot_sync(kAllLanes, row != nullptr));
    const Steps steps(cut, piece, num_vectors);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; ++step) {
        float sum[kVectors][kPerVector] = {};
        add_weighted(sum, mask, row, weight, step, num_vectors);
        const Rounded partial(sum);
        unsaid.say(ll, op.epoch);
        if (packets) {
            uint8_t* to = ll.region[home] + layout.combine_packets(op.set, token, rank);
            send_step(partial.step(), to, step, op.epoch, k);
        } else {
            partial.write(reinterpret_cast<Vec*>(ll.region[home] + layout.combine_slot(op.set, token, rank)),
                          step, num_vectors);
        }
    }
    if (packets) return;
    unsaid.home = home;
    unsaid.flag_at = layout.combine_flag(op.set, token, rank, piece);
}

// Sends one piece of each row that this rank's experts made of a token of `home`, as they are or in LogFMT-10.
template <bool kLogFmt>
__device__ __forceinline__ void send_unsummed(const LowLatencyCombineArgs& args, const Run& op,
                                              const RowPieces& cut, int home, int num_placed, int token,
                                              int piece) {
    const LowLatencyDomain& ll = args.ll;
    const LowLatencyLayout& layout = ll.layout;
    const int k = static_cast<int>(threadIdx.x % 32), num_vectors = args.hidden / 8;
    const int32_t position =
        k < args.num_topk ? position_of(args, home, num_placed, token, k, op.num_local) : -1;
    int expert = position < 0 ? -1 : position_expert(position);
    float unused;
    UnsaidPiece none;
    if (!op.sends_early && !await_selections(args, op, home, token, none, expert, unused)) return;
    if (expert >= op.num_local) expert = -1;
    const unsigned rows = distinct(args, __ballot_sync(kAllLanes, expert >= 0));
    if (rows == 0) return;
    const uint8_t* row = expert >= 0 ? locate(args, home, token, expert, position) : nullptr;
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

// Warps of the grid that share jobs, and which of them this one is. Jobs go to the blocks in turn.
struct Workers {
    int index, count;
};

// The jobs of a worker among those of all homes: pieces of tokens. Each rank begins with another home. Returns the worker's
// first job beyond them.
template <bool kSummed, bool kLogFmt>
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
                send_partial(args, op, cut, peers.packets[home], home, peers.num_placed[home], token, piece,
                             unsaid);
            } else {
                send_unsummed<kLogFmt>(args, op, cut, home, peers.num_placed[home], token, piece);
            }
        }
        job -= num_jobs;
    }
    unsaid.say(args.ll, op.epoch);
    return job;
}

constexpr unsigned kFailedParts = 0xFFFFFFFFu;

// Partial sums of a step by the first kPacketRowsAhead ranks of `left`, zeros of one that was masked meanwhile; `own` is this
// rank's. Returns the ranks that remain, kFailedParts after a failure.
__device__ __forceinline__ unsigned take_packets(const LowLatencyCombineArgs& args, const Run& op,
                                                 unsigned left, int token, int step,
                                                 const Vec (&own)[kVectors],
                                                 Vec (&parts)[kRowsAhead][kVectors]) {
    const LowLatencyDomain& ll = args.ll;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int at_hand = op.own_by_slot ? -1 : ll.domain.rank;
    uint8_t* region = ll.region[ll.domain.rank];
    const auto row_of = [&](int from) { return region + ll.layout.combine_packets(op.set, token, from); };
    PeekedStep peeked[kPacketRowsAhead];
    int ranks[kPacketRowsAhead];
#pragma unroll
    for (int i = 0; i < kPacketRowsAhead; ++i) {
        ranks[i] = __ffs(left) - 1;
        left &= left - 1;
        if (ranks[i] >= 0 && ranks[i] != at_hand) peeked[i] = peek_step(row_of(ranks[i]), step, lane);
    }
#pragma unroll
    for (int i = 0; i < kPacketRowsAhead; ++i) {
        if (ranks[i] < 0) break;
        if (ranks[i] == at_hand) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) parts[i][v] = own[v];
            continue;
        }
        const sync::Came came =
            await_step(ll, kKind, ranks[i], op.epoch, row_of(ranks[i]), step, lane, peeked[i]);
        if (came == sync::Came::kFailed) return kFailedParts;
        if (came == sync::Came::kMasked) continue;
        const RowStep part = peeked[i].step();
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
                row = locate(args, rank, token, expert - plan.experts.first(rank),
                             position_of(args, rank, num_placed, token, k, op.num_local));
                weight = args.expert_major ? args.topk_weights[at] : 1.0f;
            }
        }
    }
    unsigned ranks = __reduce_or_sync(kAllLanes, owner_bit) & here;
    const unsigned own_rows = distinct(args, __ballot_sync(kAllLanes, row != nullptr));
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
        if (!op.packets && step == steps.first) {
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
            left = op.packets ? take_packets(args, op, left, token, step, own, parts)
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

// Sums one piece of an own token from the experts' rows. False after a failure.
template <bool kLogFmt>
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
            weight = args.expert_major ? args.topk_weights[at] : 1.0f;
            if (owner == rank && !op.own_by_slot) {
                row = locate(args, rank, token, expert - plan.experts.first(rank),
                             position_of(args, rank, num_placed, token, k, op.num_local));
            } else if ((here >> owner & 1u) != 0) {
                row = ll.region[rank] + layout.combine_slot(op.set, token, k);
            }
        }
    }
    if (kLogFmt && !args.expert_major) {
        const unsigned same_rank = __match_any_sync(kAllLanes, owner);
        if (k != __ffs(same_rank) - 1) row = nullptr;
    }
    const bool travels = row != nullptr && (owner != rank || op.own_by_slot);
#pragma unroll 1
    for (unsigned left = __ballot_sync(kAllLanes, travels); left != 0; left &= left - 1) {
        const int which = __ffs(left) - 1, from = __shfl_sync(kAllLanes, owner, which);
        const int64_t flag = layout.combine_flag(op.set, token, which, piece);
        const sync::Came came = sync::await_piece(ll, kKind, from, flag, op.epoch);
        if (came == sync::Came::kFailed) return false;
        if (came == sync::Came::kMasked && k == which) row = nullptr;
    }
    const unsigned rows = __ballot_sync(kAllLanes, row != nullptr);
    const unsigned ranks = __reduce_or_sync(kAllLanes, row != nullptr ? 1u << owner : 0u);
    const unsigned travelled = kLogFmt ? __ballot_sync(kAllLanes, travels) : 0u;
    auto* out = reinterpret_cast<Vec*>(args.out + static_cast<int64_t>(token) * args.hidden * 2);
    const Steps steps(plan.cut, piece, num_vectors);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; ++step) {
        float sum[kVectors][kPerVector] = {};
        if constexpr (kLogFmt) {
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

template <bool kSummed, bool kLogFmt>
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
        if constexpr (kSummed) {
            goes_on = sum_partials(args, plan, op, here, token, piece, peers);
        } else {
            goes_on = sum_unsummed<kLogFmt>(args, plan, op, here, token, piece, peers);
        }
    }
}

// Of a block: more of them the more of the tokens' rows lie with their own rank.
__device__ __forceinline__ int own_warps(int num_ranks) {
    return num_ranks == 1 ? 0 : max(kNumWarps / num_ranks, 2);
}

// kSummed: a rank sums what its own experts made of a token before it sends one row. For that it needs the weights, which
// come from the token's home; so where rows are sent before anything can be awaited they travel one by one, as they do
// where the home sums them all, or where they travel in LogFMT-10 (kLogFmt), which codes the experts' rows, own ones too.
// Rows by source are sums already.
template <bool kSummed, bool kLogFmt = false>
__global__ void __launch_bounds__(kNumThreads, 1)
    low_latency_combine(const __grid_constant__ LowLatencyCombineArgs args,
                        const __grid_constant__ CombinePlan plan) {
    __shared__ Peers peers;
    const LowLatencyDomain& ll = args.ll;
    ptx::wait_for_earlier_kernels();
    if (plan.overlaps) ptx::launch_dependents();
    const bool has_positions = args.positions != nullptr;
    Run op{};
    op.begins = plan.part != LowLatencyPart::kReceive;
    op.ends = plan.part != LowLatencyPart::kSend;
    op.packets = plan.packets;
    op.knows_weights = !args.expert_major || (kSummed && args.weights != nullptr);
    op.sends_early = op.knows_weights || (plan.part == LowLatencyPart::kSend && has_positions);
    op.own_by_slot = plan.part != LowLatencyPart::kWhole && has_positions;
    op.num_local = plan.experts.count(ll.domain.rank);
    const int warp = static_cast<int>(threadIdx.x / 32), num_blocks = static_cast<int>(gridDim.x);
    // By another warp than the one that begins.
    const bool watches = is_leader() && warp == kNumWarps - 1;
    if (watches) sync::tell_consumed(ll, kKind);
    if (op.begins && blockIdx.x == 0) {
        send_selections(args, plan, op, peers);
        if (plan.part == LowLatencyPart::kSend && threadIdx.x == 0) *args.ticket = op.epoch;
    } else {
        begin_block(args, op, peers);
    }
    if (op.ends || op.sends_early) meet_peers(args, plan, op, peers);
    if (watches && op.ends && op.sends_early) watch_peers(args, op, peers);
    // Without positions only the homes can tell which row is whose k-th, so the rows leave in the receive part.
    const bool sends_here =
        plan.part == LowLatencyPart::kReceive ? !has_positions : op.ends || op.sends_early;
    // Where rows keep the link busy for long, some warps sum own tokens meanwhile. Else all send first, and the jobs of the
    // sums go to the warps that are free.
    const bool is_long = !op.packets && !kLogFmt;  // codes take the warps longer than the link
    const int num_own_warps = sends_here && op.ends && is_long ? own_warps(ll.domain.num_ranks) : 0;
    const bool is_own = warp < num_own_warps;
    Workers workers{};
    workers.index = static_cast<int>(blockIdx.x) + (is_own ? warp : warp - num_own_warps) * num_blocks;
    workers.count = (is_own ? num_own_warps : kNumWarps - num_own_warps) * num_blocks;
    if (sends_here && !is_own) workers.index = serve_homes<kSummed, kLogFmt>(args, op, peers, workers);
    if (!op.ends) return;
    if (is_own || num_own_warps == 0) serve_own_tokens<kSummed, kLogFmt>(args, plan, op, peers, workers);
    if (!is_leader()) return;
    __syncthreads();
    if (threadIdx.x == 0) sync::note_received(ll, kKind, op.epoch);
    if (threadIdx.x < ll.domain.num_ranks) {
        sync::keep_wait(ll, kKind, static_cast<int>(threadIdx.x), peers.waited_ns[threadIdx.x],
                        args.wait_stats);
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
    load_kernel(low_latency_combine<false, true>, "low_latency_combine");
}

void launch_low_latency_combine(const LowLatencyCombineArgs& given, LowLatencyPart part, int num_sms,
                                Stream stream) {
    LowLatencyCombineArgs args = given;
    constexpr auto* kName = "low_latency_combine";
    check_limit(args.num_topk, args.ll.layout.num_topk, kName, "the number of selections of a token");
    check_limit(args.num_tokens, args.num_max_tokens, kName, "the number of tokens");
    const int64_t row_bytes = 2 * static_cast<int64_t>(args.hidden);
    // Rows that travel plain altogether need nothing of it.
    args.use_logfmt = args.use_logfmt && !logfmt_travels_plain(args.hidden);
    const int64_t side_bytes = args.use_logfmt ? args.hidden / kTile * kLogFmtSideBytes : 0;
    check_limit(row_bytes + side_bytes, args.ll.layout.slot_bytes, kName, "the size of a row");
    check_limit(args.num_max_tokens, args.ll.layout.num_max_tokens, kName, "the largest number of tokens");
    if (!args.expert_major && (args.sum_at_home || args.positions == nullptr))
        throw std::invalid_argument(
            "deep_ep: low_latency_combine: rows by source need positions, and are sums already");
    const auto plan_of = [&](bool packets, const RowPieces& cut) {
        return CombinePlan{part,
                           may_overlap(args.ll.domain, num_sms),
                           packets,
                           cut,
                           ExpertMap::of(args.num_experts, args.ll.domain.num_ranks),
                           SmallDivider::of(args.num_topk),
                           SmallDivider::of(cut.count)};
    };
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const int num_peers = std::max(args.ll.domain.num_ranks - 1, 1);
    const int num_packet_tokens = args.ll.layout.packet_tokens;
    if (num_packet_tokens > 0)
        check_limit(by_steps(args.hidden).count * kPacketStepBytes, args.ll.layout.packet_row_bytes, kName,
                    "a row in packets");
    // Packets take half as much again on the link, and arrive sooner. Pieces are so short that each warp gets one.
    if (args.use_logfmt) {
        args.weights = nullptr;
        const RowPieces cut = logfmt::cut_row(args.hidden, kPiecesWanted / std::max(args.num_max_tokens, 1));
        launch_early(low_latency_combine<false, true>, num_blocks(args, cut, num_sms), kNumThreads, 0,
                     cuda_stream, kName, args, plan_of(false, cut));
    } else if (!args.expert_major || (args.weights != nullptr && !args.sum_at_home)) {
        // All ranks cut alike without having heard of each other.
        const bool packets = args.num_max_tokens <= num_packet_tokens;
        const auto rows = static_cast<int64_t>(args.num_max_tokens) * num_peers;
        const RowPieces cut = packets ? by_steps(args.hidden) : cut_row(row_bytes, kPiecesWanted / rows);
        launch_early(low_latency_combine<true>, num_blocks(args, cut, num_sms), kNumThreads, 0, cuda_stream,
                     kName, args, plan_of(packets, cut));
    } else if (part == LowLatencyPart::kWhole && !args.sum_at_home) {
        args.weights = nullptr;
        const bool packets = args.num_tokens <= num_packet_tokens;
        const auto rows = static_cast<int64_t>(std::max(args.num_tokens, 1)) * num_peers;
        const RowPieces cut = packets ? by_steps(args.hidden) : cut_row(row_bytes, kPiecesWanted / rows);
        launch_early(low_latency_combine<true>, num_blocks(args, cut, num_sms), kNumThreads, 0, cuda_stream,
                     kName, args, plan_of(packets, cut));
    } else {
        // Ranks that sum and ranks that do not would wait for each other's flags.
        constexpr uint64_t kUnsummed = 0x5DEECE66D;
        args.signature ^= kUnsummed;
        args.weights = nullptr;
        const RowPieces cut = cut_row(row_bytes, kPiecesWanted / std::max(args.num_max_tokens, 1));
        launch_early(low_latency_combine<false>, num_blocks(args, cut, num_sms), kNumThreads, 0, cuda_stream,
                     kName, args, plan_of(false, cut));
    }
}

}  // namespace deep_ep
