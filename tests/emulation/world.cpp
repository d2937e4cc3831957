// Ranks whose low-latency kernels run on the CPU, with their regions in one process. For tests/emulated.py, by ctypes.
#include <string>

#include "cuda_on_cpu.h"
#include "kernels/low_latency_launch.h"
#include "layout/control_block.h"
#include "layout/expert_range.h"
#include "layout/low_latency_outputs.h"
#include "sync/planted.h"

using namespace deep_ep;

namespace {

constexpr size_t kAlignment = 512;

struct Bytes {
    std::vector<uint8_t> data;
    uint8_t* begin = nullptr;

    void resize(size_t size, uint8_t value) {
        data.assign(size + kAlignment, value);
        const auto address = reinterpret_cast<uintptr_t>(data.data());
        begin = data.data() + (kAlignment - address % kAlignment) % kAlignment;
    }
};

struct Rank {
    Bytes region, heap;
    HostRecord host{};
    std::vector<uint32_t> masked;
    std::vector<uint64_t> last_waits;
    LowLatencyDomain domain{};
    emulated::Stream stream;
};

struct World {
    std::vector<Rank> ranks;
};

template <class T>
T* at(void* block, int64_t offset) {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(block) + offset);
}

// What both operations are told alike.
template <class Args, class Call>
Args arguments(const Rank& rank, uint64_t signature, const Call& call) {
    Args args{};
    args.ll = rank.domain;
    args.signature = signature;
    args.expert_major = call.expert_major != 0;
    args.x = call.x;
    args.topk_idx = call.topk_idx;
    args.topk_is_int64 = call.topk_is_int64 != 0;
    args.topk_weights = call.topk_weights;
    args.num_tokens = static_cast<int>(call.num_tokens);
    args.num_topk = static_cast<int>(call.num_topk);
    args.num_experts = static_cast<int>(call.num_experts);
    args.num_max_tokens = static_cast<int>(call.max_tokens);
    args.hidden = static_cast<int>(call.hidden);
    args.wait_stats = call.wait_stats;
    return args;
}

// Where the small outputs of the dispatch lie in their block.
template <class Args>
LowLatencyOutputs outputs_of(const Args& args, bool with_weights) {
    const Domain& domain = args.ll.domain;
    const int num_local = expert_range(args.num_experts, domain.num_ranks, domain.rank).count;
    return LowLatencyOutputs::make(num_local, domain.num_ranks, args.num_max_tokens, args.num_topk,
                                   with_weights, args.expert_major);
}

// What a launch refuses, for Python; empty if nothing.
thread_local std::string refusal;

template <class Launch>
int guarded(const Launch& launch) {
    try {
        launch();
    } catch (const std::exception& error) {
        refusal = error.what();
        return -1;
    }
    return 0;
}

}  // namespace

extern "C" {

// As in tests/emulated.py.
struct WorldShape {
    int64_t num_ranks, max_tokens, num_topk, num_experts, hidden;
    int64_t num_sms;  // of each rank
    int64_t timeout_ns, mask_after_ns;
    int64_t delay_seed, planted;
    int64_t with_lines;
};

struct DispatchCall {
    const uint8_t* x;
    const void* topk_idx;
    const float* topk_weights;
    uint8_t* rows;
    uint32_t* scales;
    void* small;
    int32_t* recv_stats;
    int64_t* wait_stats;
    int64_t topk_is_int64, num_tokens, num_topk, num_experts, max_tokens, hidden, format, expert_major,
        num_sms;
};

struct CombineCall {
    const uint8_t* x;
    void* small;
    const void* topk_idx;
    const float* topk_weights;
    uint8_t* out;
    int64_t* wait_stats;
    uint64_t* ticket;
    int64_t knows_positions, knows_weights;
    int64_t topk_is_int64, num_tokens, num_topk, num_experts, max_tokens, hidden, expert_major, sum_at_home,
        use_logfmt;
    int64_t num_sms;
};

World* world_open(const WorldShape* shape) {
    auto* world = new World;
    const auto num_ranks = static_cast<int>(shape->num_ranks);
    world->ranks = std::vector<Rank>(num_ranks);
    LowLatencyLayout layout = LowLatencyLayout::make(
        num_ranks, static_cast<int>(shape->max_tokens), static_cast<int>(shape->num_topk),
        expert_range(static_cast<int>(shape->num_experts), num_ranks, 0).count, shape->hidden);
    if (shape->with_lines == 0) layout.dispatch_line_tokens = layout.combine_line_tokens = 0;
    for (Rank& rank : world->ranks) {
        rank.region.resize(layout.num_bytes, 0xCD);
        std::memset(rank.region.begin, 0, layout.state_bytes());
        rank.heap.resize(sizeof(ControlBlock), 0);
        rank.masked.assign(num_ranks, 0);
        rank.last_waits.assign(2 * num_ranks, 0);
    }
    for (int r = 0; r < num_ranks; ++r) {
        Rank& rank = world->ranks[r];
        LowLatencyDomain& ll = rank.domain;
        for (int peer = 0; peer < num_ranks; ++peer) {
            ll.domain.base[peer] = world->ranks[peer].heap.begin;
            ll.region[peer] = world->ranks[peer].region.begin;
        }
        ll.domain.num_ranks = num_ranks;
        ll.domain.rank = r;
        ll.domain.host = &rank.host;
        ll.domain.num_sms = static_cast<int>(shape->num_sms);
        ll.domain.timeout_ns = static_cast<uint64_t>(shape->timeout_ns);
        ll.domain.warn_ns = ~uint64_t{0};
        ll.domain.delay_seed = static_cast<uint32_t>(shape->delay_seed);
        ll.domain.planted = static_cast<uint32_t>(shape->planted);
        ll.layout = layout;
        ll.masked = rank.masked.data();
        ll.last_waits_ns = rank.last_waits.data();
        ll.mask_after_ns = static_cast<uint64_t>(shape->mask_after_ns);
    }
    return world;
}

int world_dispatch(World* world, int r, uint64_t signature, const DispatchCall* call, int part) {
    Rank& rank = world->ranks[r];
    auto args = arguments<LowLatencyDispatchArgs>(rank, signature, *call);
    args.use_fp8 = call->format >= 0;
    args.format = static_cast<ScaleFormat>(std::max<int64_t>(call->format, 0));
    args.rows = call->rows;
    args.scales = call->scales;
    const LowLatencyOutputs outputs = outputs_of(args, args.topk_weights != nullptr);
    args.layout_range = at<int64_t>(call->small, 0);
    args.ticket = at<uint64_t>(call->small, outputs.ticket_at);
    args.recv_count = at<int32_t>(call->small, outputs.recv_count_at);
    args.src_info = at<int32_t>(call->small, outputs.src_info_at);
    args.source_tokens = at<int32_t>(call->small, outputs.source_tokens_at);
    args.positions = at<int32_t>(call->small, outputs.positions_at);
    if (args.topk_weights != nullptr) args.weights = at<float>(call->small, outputs.weights_at);
    args.recv_stats = call->recv_stats;
    return guarded([&] {
        launch_low_latency_dispatch(args, static_cast<LowLatencyPart>(part), static_cast<int>(call->num_sms),
                                    &rank.stream);
    });
}

int world_combine(World* world, int r, uint64_t signature, const CombineCall* call, int part) {
    Rank& rank = world->ranks[r];
    auto args = arguments<LowLatencyCombineArgs>(rank, signature, *call);
    args.sum_at_home = call->sum_at_home != 0;
    args.use_logfmt = call->use_logfmt != 0;
    args.out = call->out;
    args.ticket = call->ticket;
    const LowLatencyOutputs outputs = outputs_of(args, call->knows_weights != 0);
    if (args.expert_major) {
        args.src_info = at<int32_t>(call->small, outputs.src_info_at);
        args.layout_range = at<int64_t>(call->small, 0);
    }
    if (call->knows_positions != 0) {
        args.source_tokens = at<int32_t>(call->small, outputs.source_tokens_at);
        args.positions = at<int32_t>(call->small, outputs.positions_at);
        if (call->knows_weights != 0 && args.expert_major)
            args.weights = at<float>(call->small, outputs.weights_at);
    }
    return guarded([&] {
        launch_low_latency_combine(args, static_cast<LowLatencyPart>(part), static_cast<int>(call->num_sms),
                                   &rank.stream);
    });
}

void world_refuse(World* world, int r, int kind) {
    launch_low_latency_refuse(world->ranks[r].domain, static_cast<LowLatencyKind>(kind),
                              &world->ranks[r].stream);
}

// Until what was launched for the rank is over.
void world_wait(World* world, int r) {
    world->ranks[r].stream.wait();
}

const char* world_refusal() {
    return refusal.c_str();
}

// What kernels of the rank reported: error, phase, peer, and 1 + a rank that refused.
void world_failure(World* world, int r, int64_t* record) {
    const HostRecord& host = world->ranks[r].host;
    record[0] = host.error, record[1] = host.phase, record[2] = host.peer, record[3] = host.refused_by;
}

// For WorldShape::planted: rows are taken before they have come.
int64_t world_takes_unawaited() {
    return int64_t{1} << static_cast<int>(Contract::kAwaitAnnouncement);
}

void world_masks(World* world, int r, int64_t* masks) {
    const std::vector<uint32_t>& masked = world->ranks[r].masked;
    std::copy(masked.begin(), masked.end(), masks);
}

void world_close(World* world) {
    for (Rank& rank : world->ranks) rank.stream.wait();
    delete world;
}
}
