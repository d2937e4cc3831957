#include "kernels/low_latency_rows.cuh"
#include "kernels/probe_checks.h"
#include "kernels/probe_launch.h"
#include "runtime/errors.h"

namespace deep_ep {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kMaxBlockChannels = 16;
constexpr int kFaultEvery = 16;  // steps
constexpr uint64_t kTagLeadNs = 2000;
constexpr unsigned kWrongHalves = 1, kWrongDisplaced = 2, kWrongScales = 4;

// A warp's half of a channel.
struct Channel {
    int index, num_channels;  // of all blocks
    int lane;
    uint64_t deadline_ns;

    // The lines of a channel are a row of kNumSets steps.
    __device__ __forceinline__ uint8_t* row(uint8_t* base) const {
        return base + static_cast<int64_t>(index) * kNumSets * kLineStepBytes;
    }
    // A word for each set: the last step of its epochs that was received.
    __device__ __forceinline__ uint8_t* received(uint8_t* base, uint64_t epoch) const {
        return base + static_cast<int64_t>(num_channels) * kNumSets * kLineStepBytes +
               (index * kNumSets + set_of(epoch)) * static_cast<int64_t>(sizeof(uint64_t));
    }
    __device__ __forceinline__ static int set_of(uint64_t epoch) {
        return static_cast<int>(epoch % kNumSets);
    }
};

// What a rank sends as step `epoch`. Words look random; as mixed() is one to one in each part, every one of them
// differs from what was in its place before.
__device__ __forceinline__ RowStep step_of(int rank, const Channel& channel, uint64_t epoch) {
    constexpr uint32_t kWords = 9;  // of a lane
    uint32_t seed = sync::mixed(0x13579BDFu, static_cast<uint32_t>(epoch));
    seed = sync::mixed(sync::mixed(seed, static_cast<uint32_t>(rank)), static_cast<uint32_t>(channel.index));
    const auto word = [&](uint32_t i) {
        return sync::mixed(seed, static_cast<uint32_t>(channel.lane) * kWords + i);
    };
    return {{{word(0), word(1), word(2), word(3)}, {word(4), word(5), word(6), word(7)}}, word(8)};
}

// By all lanes of a warp: whether `is_here()` was true in all of them before the deadline. They leave the loop
// together: lanes that went apart would store and load the parts of a line one after the other.
template <class IsHere>
__device__ __forceinline__ bool await(uint64_t deadline_ns, const IsHere& is_here) {
    constexpr uint32_t kTries = 64;  // between looks at the clock
#pragma unroll 1
    for (uint32_t tries = 1; !__all_sync(kAllLanes, is_here()); ++tries) {
        if (tries % kTries == 0 && __any_sync(kAllLanes, ptx::globaltimer_ns() > deadline_ns)) return false;
    }
    return true;
}

// A wrong word of the planted kind, in a lane that has such words.
__device__ __forceinline__ void spoil(RowStep& what, LineFault planted, int lane) {
    if (planted == LineFault::kHalf && lane == 13) what.halves[1].y ^= 1u;
    if (planted == LineFault::kDisplaced && lane == 3 * kLineLanes - 1) what.halves[0].w ^= 1u;
    if (planted == LineFault::kScale && lane == 3) what.scale_word ^= 1u << 31;
}

// Sends all steps of a channel; whether there was time for them.
//
// Order: a set is written again after the peer's loads of what was in it, since that depends on a branch on the word
// that acknowledges it.
__device__ __forceinline__ bool send_all(const ProbeLinesArgs& args, const Channel& channel) {
    uint8_t* row = channel.row(args.peer);
#pragma unroll 1
    for (uint64_t epoch = 1; epoch <= static_cast<uint64_t>(args.rounds); ++epoch) {
        if (epoch > kNumSets) {
            const uint8_t* received = channel.received(args.own, epoch);
            const bool came = await(channel.deadline_ns, [&] {
                return sync::is_here(sync::peek_word(received), epoch - kNumSets);
            });
            if (!came) return false;
        }
        RowStep what = step_of(args.rank, channel, epoch);
        const int set = Channel::set_of(epoch);
        if (args.planted != LineFault::kNone && epoch % kFaultEvery == 0) {
            if (args.planted == LineFault::kTagFirst) {
                // The words of the step before in this set, beside the new tags.
                send_step(step_of(args.rank, channel, epoch - kNumSets), row, set, epoch, channel.lane);
                await(ptx::globaltimer_ns() + kTagLeadNs, [] { return false; });
            }
            spoil(what, args.planted, channel.lane);
        }
        send_step(what, row, set, epoch, channel.lane);
    }
    return true;
}

// Whether a look found some lines of a step, but not all of them.
__device__ __forceinline__ bool is_part(const PeekedStep& peeked, uint64_t epoch, int lane) {
    const bool half = sync::is_here(peeked.halves[0], epoch) || sync::is_here(peeked.halves[1], epoch);
    const bool some = (lane % kLineLanes == kLineLanes - 1 && half) ||
                      (lane < kLineLanes && sync::is_here(peeked.rest, epoch));
    return __any_sync(kAllLanes, some) && !__all_sync(kAllLanes, peeked.is_here(epoch, lane));
}

// Which kinds of words of the step are wrong; the same for all lanes.
__device__ __forceinline__ unsigned compare(const RowStep& got, const RowStep& want, int lane) {
    unsigned wrong = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 &a = got.halves[half], &b = want.halves[half];
        if (a.x != b.x || a.y != b.y || a.z != b.z) wrong |= kWrongHalves;
        if (a.w != b.w) wrong |= lane % kLineLanes == kLineLanes - 1 ? kWrongDisplaced : kWrongHalves;
    }
    // Those of a step's scales are in its first lanes.
    if (lane < kLineLanes && got.scale_word != want.scale_word) wrong |= kWrongScales;
    return __reduce_or_sync(kAllLanes, wrong);
}

// Receives all steps of a channel, adding to `counts`; whether they came in time.
//
// Order: the word that acknowledges a step holds what was found in it, so it follows the loads of all lanes.
__device__ __forceinline__ bool receive_all(const ProbeLinesArgs& args, const Channel& channel,
                                            uint32_t (&counts)[kNumLineCounts]) {
    const auto count = [&](LineCount what, bool holds) { counts[static_cast<int>(what)] += holds ? 1u : 0u; };
    const uint8_t* row = channel.row(args.own);
    const int lane = channel.lane;
#pragma unroll 1
    for (uint64_t epoch = 1; epoch <= static_cast<uint64_t>(args.rounds); ++epoch) {
        const RowStep want = step_of(args.peer_rank, channel, epoch);
        PeekedStep peeked;
        const bool came = await(channel.deadline_ns, [&] {
            peeked = peek_step(row, Channel::set_of(epoch), lane);
            count(LineCount::kCaught, is_part(peeked, epoch, lane));
            return peeked.is_here(epoch, lane);
        });
        if (!came) return false;
        const unsigned wrong = compare(peeked.step(lane), want, lane);
        count(LineCount::kSteps, true);
        count(LineCount::kTorn, wrong != 0);
        count(LineCount::kHalves, (wrong & kWrongHalves) != 0);
        count(LineCount::kDisplaced, (wrong & kWrongDisplaced) != 0);
        count(LineCount::kScales, (wrong & kWrongScales) != 0);
        if (lane == 0) sync::send_word(channel.received(args.peer, epoch), epoch, wrong);
    }
    return true;
}

// The first half of a block's warps send, the others receive.
__global__ void __launch_bounds__(2 * kMaxBlockChannels * 32)
    probe_lines(const __grid_constant__ ProbeLinesArgs args) {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int channels = static_cast<int>(blockDim.x / 64);
    const Channel channel{static_cast<int>(blockIdx.x) * channels + warp % channels,
                          static_cast<int>(gridDim.x) * channels, lane,
                          ptx::globaltimer_ns() + args.timeout_ns};
    uint32_t counts[kNumLineCounts] = {};
    const bool in_time = warp < channels ? send_all(args, channel) : receive_all(args, channel, counts);
    if (lane != 0) return;
    counts[static_cast<int>(LineCount::kLate)] = in_time ? 0 : 1;
#pragma unroll
    for (int i = 0; i < kNumLineCounts; ++i) {
        if (counts[i] != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&args.counts[i]), counts[i]);
    }
}

}  // namespace

void launch_probe_lines(const ProbeLinesArgs& args, int num_sms, int channels, Stream stream) {
    constexpr int kMaxRounds = 1 << 24;
    check_range(num_sms, 1, 65535, "num_sms");
    check_range(channels, 1, kMaxBlockChannels, "channels");
    check_range(args.rounds, 1, kMaxRounds, "rounds");
    check_range(static_cast<int>(args.planted), 0, static_cast<int>(LineFault::kTagFirst), "planted");
    check_multiple(static_cast<int64_t>(reinterpret_cast<uintptr_t>(args.own)), kLineBytes, "own");
    check_multiple(static_cast<int64_t>(reinterpret_cast<uintptr_t>(args.peer)), kLineBytes, "peer");
    probe_lines<<<num_sms, 2 * channels * 32, 0, static_cast<cudaStream_t>(stream)>>>(args);
    check_launch("probe_lines");
}

}  // namespace deep_ep
