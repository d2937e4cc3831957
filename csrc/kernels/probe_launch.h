// Probes of what a link and the SMs can do: the least that dispatch and combine have to move, without their
// bookkeeping. They are the limits that benchmarks and the doctor hold the operations against. Free of CUDA headers.
#pragma once

#include <cstdint>

#include "kernels/launch.h"

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

}  // namespace deep_ep
