// Where things lie in the region that low-latency operations use: one symmetric block on every rank, the same layout
// on all of them. Shared by host and device, so that sizes cannot disagree.
//
// Operations of a kind (dispatch, combine) are numbered by epochs from 1 on. An operation uses the set of its epoch's
// parity, so two can be under way. Everything that says "it is here" holds an epoch, at a place of its own whatever the
// shapes of a call: nothing is ever cleared, and no data can be taken for a flag.
//
// A rank's region holds what peers write there:
//   dispatch, by source rank:  a header, the counts of this rank's experts, an entry and maybe a weight for each (token, k),
//                              and each token of the source: its row, behind it its scales.
//   combine, by home rank:     a header, and a selection for each (token, k), written by the home.
//   combine, as the home:      rows by (token, j): what rank j made of the token, or, unsummed, what expert k made of it.
//
// Words, packets and lines carry the low half of their epoch, so that one load both waits and reads. Rows travel in lines if
// they are of few enough tokens; else they lie in slots and travel in pieces, each with a flag.
// A tag would be taken for a later one's only after 2^32 operations without another use of its place.
#pragma once

#include <cstdint>

#include "layout/control_block.h"
#include "layout/host_device.h"

namespace deep_ep {

constexpr int kNumSets = 2;
constexpr int kMaxRowPieces = 8;
constexpr int kStepBytes =
    1024;  // what a warp moves at a time by 16 bytes a lane, twice; pieces are multiples of it

// Limits of packed numbers: entries and positions are one int32 each.
constexpr int kMaxLowLatencyTokens = 1 << 16;  // of a rank
constexpr int kMaxPackedRows = 1 << 20;        // rows of an expert: ranks x tokens
constexpr int kMaxLowLatencyTopk = 32;

enum class LowLatencyKind : int { kDispatch = 0, kCombine = 1 };
constexpr int kNumKinds = 2;

// A dispatch entry: where token t goes for its k-th selection. -1: not to this rank.
DEEP_EP_HOST_DEVICE int32_t pack_entry(int local_expert, int ordinal) {
    return local_expert << 16 | ordinal;
}
DEEP_EP_HOST_DEVICE int entry_expert(int32_t entry) {
    return entry >> 16;
}
// How many earlier tokens of the same source go to the expert.
DEEP_EP_HOST_DEVICE int entry_ordinal(int32_t entry) {
    return entry & 0xFFFF;
}

// A position: where (source, token, k) lies in the packed rows, kept from dispatch for combine. -1: not here.
DEEP_EP_HOST_DEVICE int32_t pack_position(int local_expert, int row) {
    return local_expert << 20 | row;
}
DEEP_EP_HOST_DEVICE int position_expert(int32_t position) {
    return position >> 20;
}
DEEP_EP_HOST_DEVICE int position_row(int32_t position) {
    return position & (kMaxPackedRows - 1);
}

// What a rank tells one other of its part of an operation, in one packet.
struct LowLatencyHeader {
    uint32_t signature;  // of what must be equal on all ranks, or kRefusedTag
    int num_tokens;      // of the writer
    // dispatch: of each row that the writer sends; combine: of each row that is sent to the writer. 0: rows travel in lines.
    int num_pieces;
    int piece_steps;  // of all pieces but the last one
};
constexpr uint32_t kRefusedTag = 0;

// Half of a signature that travels; never kRefusedTag.
DEEP_EP_HOST_DEVICE uint32_t signature_tag(uint64_t signature) {
    return static_cast<uint32_t>(signature ^ signature >> 32) | 1u;
}

// At the start of a region.
struct alignas(128) LowLatencyControl {
    // Written by the owner's kernels. begun: operations << 16, and what the blocks of a kernel under way have added to it.
    uint64_t begun[kNumKinds];
    uint64_t received[kNumKinds][kNumSets];  // last epoch of each parity that has been received
    // Where ranks may be masked: epoch * 2 + whether the rank takes part. The first block that knows decides for all.
    uint64_t verdict[kNumKinds][kNumSets][kMaxPeers];
    // Written by peers: the last epoch of each parity that the peer is done with, in its memory.
    alignas(128) uint64_t consumed[kNumKinds][kNumSets][kMaxPeers];
};

constexpr int kPacketBytes = 16;
constexpr int kShortTokens =
    128;  // of a rank: with more of them the link is busy for long, and roles are divided
// Of a rank, at most, whose rows may travel in lines, which begin to be used sooner, but take an eighth more of the link.
constexpr int kDispatchLineTokens = kShortTokens, kCombineLineTokens = 1024;
constexpr int kLineRanks = 16;  // with more of them none do: the memory would exceed what callers reckon with
// A step in lines: 128 bytes each, the last word of which is an epoch. The words that these take the place of lie in the last
// line, with the words of scales.
constexpr int kLineBytes = 128;
constexpr int kLineLanes = kLineBytes / 16;
constexpr int kStepLines = kStepBytes / kLineBytes + 1;
constexpr int kLineStepBytes = kStepLines * kLineBytes;

// Offsets from the start of a region, in bytes.
struct LowLatencyLayout {
    int num_ranks;
    int num_max_tokens;                             // of a rank
    int num_topk;                                   // the largest
    int num_max_local_experts;                      // of the rank that has most
    int dispatch_line_tokens, combine_line_tokens;  // of a rank, whose rows may travel in lines
    int64_t slot_bytes;                             // a row as bf16, or any other form of it with scales
    int64_t line_row_bytes;
    int64_t dispatch_metadata_bytes, combine_metadata_bytes;  // of a (set, rank)
    int64_t entries_after, weights_after;                     // the header of a dispatch, in bytes
    // First bytes of the parts.
    int64_t dispatch_metadata_at, combine_metadata_at, dispatch_flags_at, combine_flags_at;
    int64_t dispatch_lines_at, combine_lines_at;
    int64_t dispatch_slots_at, combine_slots_at;
    int64_t num_bytes;  // of the region

    static constexpr int64_t kAlignment = 128;

    DEEP_EP_HOST_DEVICE static int64_t padded(int64_t bytes) {
        return (bytes + kAlignment - 1) / kAlignment * kAlignment;
    }

    // What has to be zero before the first operation: everything but the slots.
    DEEP_EP_HOST_DEVICE int64_t state_bytes() const { return dispatch_slots_at; }

    // Slots of a token at its home in combine.
    DEEP_EP_HOST_DEVICE int rows_per_token() const { return num_ranks > num_topk ? num_ranks : num_topk; }

    static LowLatencyLayout make(int num_ranks, int num_max_tokens, int num_topk, int num_max_local_experts,
                                 int64_t hidden) {
        LowLatencyLayout layout{};
        layout.num_ranks = num_ranks;
        layout.num_max_tokens = num_max_tokens;
        layout.num_topk = num_topk;
        layout.num_max_local_experts = num_max_local_experts;
        layout.slot_bytes = padded(2 * hidden + 4 * ((hidden + 127) / 128));
        const auto line_tokens = [&](int most) {
            if (num_ranks > kLineRanks) return 0;
            return num_max_tokens < most ? num_max_tokens : most;
        };
        layout.dispatch_line_tokens = line_tokens(kDispatchLineTokens);
        layout.combine_line_tokens = line_tokens(kCombineLineTokens);
        layout.line_row_bytes = (2 * hidden + kStepBytes - 1) / kStepBytes * kLineStepBytes;
        const int64_t selections = static_cast<int64_t>(num_max_tokens) * num_topk;
        layout.entries_after = kAlignment + padded(8 * static_cast<int64_t>(num_max_local_experts));
        layout.weights_after = layout.entries_after + padded(8 * selections);
        layout.dispatch_metadata_bytes = layout.weights_after + padded(8 * selections);
        layout.combine_metadata_bytes = kAlignment + padded(kPacketBytes * selections);
        const int64_t dispatch_rows = static_cast<int64_t>(num_ranks) * num_max_tokens;
        const int64_t combine_rows = static_cast<int64_t>(layout.rows_per_token()) * num_max_tokens;
        constexpr int64_t kFlags = kMaxRowPieces * sizeof(uint64_t);
        int64_t end = padded(sizeof(LowLatencyControl));
        auto place = [&end](int64_t bytes) {
            const int64_t at = end;
            end += padded(kNumSets * bytes);
            return at;
        };
        layout.dispatch_metadata_at = place(num_ranks * layout.dispatch_metadata_bytes);
        layout.combine_metadata_at = place(num_ranks * layout.combine_metadata_bytes);
        layout.dispatch_flags_at = place(dispatch_rows * kFlags);
        layout.combine_flags_at = place(combine_rows * kFlags);
        layout.dispatch_lines_at = place(num_ranks * layout.dispatch_line_tokens * layout.line_row_bytes);
        layout.combine_lines_at = place(num_ranks * layout.combine_line_tokens * layout.line_row_bytes);
        layout.dispatch_slots_at = place(dispatch_rows * layout.slot_bytes);
        layout.combine_slots_at = place(combine_rows * layout.slot_bytes);
        layout.num_bytes = end;
        return layout;
    }

    DEEP_EP_HOST_DEVICE int64_t header(LowLatencyKind kind, int set, int rank) const {
        const int64_t index = set * num_ranks + rank;
        return kind == LowLatencyKind::kDispatch ? dispatch_metadata_at + index * dispatch_metadata_bytes
                                                 : combine_metadata_at + index * combine_metadata_bytes;
    }

    // Tagged words [local experts of the reader]: tokens that the source sends to each.
    DEEP_EP_HOST_DEVICE int64_t dispatch_counts(int set, int source) const {
        return header(LowLatencyKind::kDispatch, set, source) + kAlignment;
    }
    // Tagged words [tokens of the source, K of the call], see pack_entry.
    DEEP_EP_HOST_DEVICE int64_t dispatch_entries(int set, int source) const {
        return header(LowLatencyKind::kDispatch, set, source) + entries_after;
    }
    // Tagged words [tokens of the source, K of the call]: weights of the selections that lie with the reader.
    DEEP_EP_HOST_DEVICE int64_t dispatch_weights(int set, int source) const {
        return header(LowLatencyKind::kDispatch, set, source) + weights_after;
    }
    // Packets [tokens of the home, K of the call]: local expert of the reader, or -1, and the weight.
    DEEP_EP_HOST_DEVICE int64_t combine_selections(int set, int home) const {
        return header(LowLatencyKind::kCombine, set, home) + kAlignment;
    }

    DEEP_EP_HOST_DEVICE int64_t dispatch_row(int set, int source, int token) const {
        return (static_cast<int64_t>(set) * num_ranks + source) * num_max_tokens + token;
    }
    DEEP_EP_HOST_DEVICE int64_t dispatch_slot(int set, int source, int token) const {
        return dispatch_slots_at + dispatch_row(set, source, token) * slot_bytes;
    }
    DEEP_EP_HOST_DEVICE int64_t dispatch_flag(int set, int source, int token, int piece) const {
        return dispatch_flags_at + (dispatch_row(set, source, token) * kMaxRowPieces + piece) * 8;
    }

    DEEP_EP_HOST_DEVICE int64_t dispatch_lines(int set, int source, int token) const {
        const int64_t row = (static_cast<int64_t>(set) * num_ranks + source) * dispatch_line_tokens + token;
        return dispatch_lines_at + row * line_row_bytes;
    }

    // j: a rank, or, unsummed, a k.
    DEEP_EP_HOST_DEVICE int64_t combine_row(int set, int token, int j) const {
        return (static_cast<int64_t>(set) * num_max_tokens + token) * rows_per_token() + j;
    }
    DEEP_EP_HOST_DEVICE int64_t combine_slot(int set, int token, int j) const {
        return combine_slots_at + combine_row(set, token, j) * slot_bytes;
    }
    DEEP_EP_HOST_DEVICE int64_t combine_flag(int set, int token, int j, int piece) const {
        return combine_flags_at + (combine_row(set, token, j) * kMaxRowPieces + piece) * 8;
    }
    DEEP_EP_HOST_DEVICE int64_t combine_lines(int set, int token, int rank) const {
        const int64_t row = (static_cast<int64_t>(set) * combine_line_tokens + token) * num_ranks + rank;
        return combine_lines_at + row * line_row_bytes;
    }
};

// A rank's view of its peers in low-latency operations.
struct LowLatencyDomain {
    Domain domain;
    uint8_t* region[kMaxPeers];  // by rank, as mapped here
    LowLatencyLayout layout;
    // In own device memory, beyond the lifetime of a region.
    uint32_t* masked;         // [R]: not 0 for a rank that is left out
    uint64_t* last_waits_ns;  // [kNumKinds, R]: how long the last operation waited for that rank
    uint64_t
        mask_after_ns;  // a rank that is awaited for longer is masked; 0: it is a failure, after domain.timeout_ns
};

// How a row of `row_bytes` is cut: pieces are multiples of kStepBytes, so many that `wanted` is not exceeded.
struct RowPieces {
    int count;
    int bytes;  // of all but the last one
};

DEEP_EP_HOST_DEVICE RowPieces cut_row(int64_t row_bytes, int64_t wanted) {
    const int64_t steps = (row_bytes + kStepBytes - 1) / kStepBytes;
    if (wanted > kMaxRowPieces) wanted = kMaxRowPieces;
    if (wanted > steps) wanted = steps;
    if (wanted < 1) wanted = 1;
    const int64_t piece_steps = (steps + wanted - 1) / wanted;
    return {static_cast<int>((steps + piece_steps - 1) / piece_steps),
            static_cast<int>(piece_steps * kStepBytes)};
}

}  // namespace deep_ep
