// Probes of what a link and the SMs can do: the least that dispatch and combine have to move, without their
// bookkeeping. They are the limits that benchmarks and the doctor hold the operations against. probe_lines asks the
// hardware for what low-latency rows rely on instead. Free of CUDA headers.
#pragma once

#include <cstdint>

#include "kernels/launch.h"
#include "layout/low_latency_layout.h"

namespace deep_ep {

// Rows through shared memory by bulk copies, to a peer and, unless null, to an own place as well.
struct ProbePushArgs {
    const uint8_t* rows;
    uint8_t* peer_rows;
    uint8_t* own_rows;  // or null
    int num_rows;
    int64_t row_bytes;      // multiple of 16
    const uint8_t* scales;  // a second array, or null: `scale_bytes` a row, multiple of 16
    uint8_t* peer_scales;
    uint8_t* own_scales;  // null exactly where own_rows is
    int scale_bytes;
    bool scales_by_bulk;  // else by 16-byte stores of the warp
};

// How a push runs. A warp has `ahead` loads under way and up to `behind` stores that still read their stage.
struct ProbePushShape {
    int num_sms;
    int warps;   // 1 to 16
    int ahead;   // from 1
    int behind;  // 0 to 3; stages = ahead + behind + 1, at most 8
    int piece_bytes;
};
void launch_probe_push(const ProbePushArgs& args, const ProbePushShape& shape, Stream stream);

// out = bf16(row at the peer + own row), summed in FP32 with the bits of combine.
struct ProbePullArgs {
    const uint8_t* peer_rows;
    const uint8_t* own_rows;
    uint8_t* out;
    int num_rows;
    int64_t row_bytes;
};

struct ProbePullShape {
    int num_sms;
    int warps;         // that sum, 1 to 15, with 14 vectors 1 to 7
    int stages;        // 2 to 8 a warp
    int vectors;       // of 16 bytes a lane and piece: 4, 7, 8 or 14
    bool own_by_bulk;  // the own row through shared memory too, else by 16-byte loads one piece ahead
    bool out_by_bulk;  // the sums leave through shared memory, else by 16-byte stores
    bool producer;     // one more warp loads for all, else each warp for itself
    bool one_polls;    // one lane waits for a stage, else all do
};
void launch_probe_pull(const ProbePullArgs& args, const ProbePullShape& shape, Stream stream);

// A copy by 16-byte loads and stores, either side at a peer.
struct ProbeRegistersArgs {
    const uint8_t* source;
    uint8_t* target;
    int64_t bytes;  // multiple of 16
};
void launch_probe_registers(const ProbeRegistersArgs& args, int num_sms, int warps, Stream stream);

// Two ranks answer each other `rounds` times: payload, then a flag with release order. Each waits no longer than
// `timeout_ns` for an answer. Flags only grow: both ranks pass the same `first`, above all flags sent before.
struct ProbeFlagsArgs {
    const uint64_t* own_flag;  // written by the peer
    uint64_t* peer_flag;
    const uint8_t* payload;
    uint8_t* peer_payload;
    int64_t payload_bytes;  // multiple of 16, or 0
    uint64_t first;
    int rounds;   // from 2
    bool starts;  // on one of the two ranks
    uint64_t timeout_ns;
    uint64_t* result;  // [2]: ns from the end of the first round to the end of the last; rounds completed
};
void launch_probe_flags(const ProbeFlagsArgs& args, Stream stream);

// What probe_lines counts, in this order. A torn step is one whose tags were all there while some words were not.
enum class LineCount : int {
    kSteps = 0,      // received and compared
    kTorn = 1,       // of these, steps with any wrong word; by kind below, and a step may be of several kinds
    kHalves = 2,     // wrong: a word that travels in its place
    kDisplaced = 3,  // a word whose place a tag took
    kScales = 4,     // a word of scales
    kCaught = 5,     // looks that found some lines of a step there and others not yet
    kLate = 6        // warps that gave up at the deadline
};
constexpr const char* kLineCounts[] = {"steps", "torn", "halves", "displaced", "scales", "caught", "late"};
constexpr int kNumLineCounts = sizeof(kLineCounts) / sizeof(kLineCounts[0]);

// What a test plants in every 16th step that a rank sends, so that the peer has something to count.
enum class LineFault : int { kNone = 0, kHalf = 1, kDisplaced = 2, kScale = 3, kTagFirst = 4 };

struct PlantedLineFault {
    const char* name;
    LineFault fault;
};
// A wrong word of a kind, or tags that are there 2 us before their words.
constexpr PlantedLineFault kPlantedLineFaults[] = {
    {"halves", LineFault::kHalf},
    {"displaced", LineFault::kDisplaced},
    {"scales", LineFault::kScale},
    {"tags first", LineFault::kTagFirst},
};

// Two ranks, or a rank and itself, send each other steps in lines, as low-latency rows travel, and compare every word
// of what comes. A channel is a warp that sends and one that receives; all of both ranks must find an SM at once.
struct ProbeLinesArgs {
    // probe_lines_bytes() each, at multiples of 128, zeroed before the ranks meet for a launch.
    uint8_t* own;  // written by the peer
    uint8_t* peer;
    int rank, peer_rank;  // that the words depend on
    int rounds;           // steps of a channel, from 1
    LineFault planted;
    uint64_t timeout_ns;  // of the whole kernel
    uint64_t* counts;     // [kNumLineCounts], of what this rank receives; added to
};
void launch_probe_lines(const ProbeLinesArgs& args, int num_sms, int channels, Stream stream);

// `num_channels`: of all SMs. The steps of each set of a channel, then the words that acknowledge them.
DEEP_EP_HOST_DEVICE int64_t probe_lines_bytes(int num_channels) {
    return static_cast<int64_t>(num_channels) * kNumSets *
           (kLineStepBytes + static_cast<int>(sizeof(uint64_t)));
}

}  // namespace deep_ep
