// How a grid of warps shares out rows that are cut into pieces: job = row * pieces + piece, one job a warp in turn.
//
// The walk from one job to the next adds and carries. A division per job costs more than a piece takes to move.
#pragma once

#include <cstdint>

#include "layout/host_device.h"

namespace deep_ep {

// Rows of `row_bytes` in `count` pieces of `bytes` (a multiple of 16), the last of which may be shorter.
struct Pieces {
    int64_t row_bytes;
    int bytes;
    int count;

    DEEP_EP_HOST_DEVICE int64_t begin(int piece) const { return static_cast<int64_t>(piece) * bytes; }
    DEEP_EP_HOST_DEVICE uint32_t size(int piece) const {
        const int64_t left = row_bytes - begin(piece);
        return static_cast<uint32_t>(left < bytes ? left : bytes);
    }
};

// Pieces of equal size, none above `max_bytes`.
DEEP_EP_HOST_DEVICE Pieces equal_pieces(int64_t row_bytes, int64_t max_bytes) {
    const int64_t wanted = (row_bytes + max_bytes - 1) / max_bytes;
    const int64_t bytes = (row_bytes / 16 + wanted - 1) / wanted * 16;
    return {row_bytes, static_cast<int>(bytes), static_cast<int>((row_bytes + bytes - 1) / bytes)};
}

struct PieceWalk {
    int row;
    int piece;
    int step_rows;
    int step_pieces;
    int num_pieces;

    DEEP_EP_HOST_DEVICE PieceWalk(int first_job, int step, int pieces)
        : row(first_job / pieces),
          piece(first_job % pieces),
          step_rows(step / pieces),
          step_pieces(step % pieces),
          num_pieces(pieces) {}

    DEEP_EP_HOST_DEVICE void next() {
        row += step_rows;
        piece += step_pieces;
        if (piece >= num_pieces) {
            piece -= num_pieces;
            ++row;
        }
    }
};

}  // namespace deep_ep
