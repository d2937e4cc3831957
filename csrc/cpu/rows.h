// Gather and sum of rows on the CPU.
#pragma once

#include <cstdint>

#include "layout/fp8_format.h"

namespace deep_ep::cpu {

struct GatherRows {
    const uint8_t* x;
    int64_t num_x_rows;
    int64_t x_stride;  // bytes
    const void* index;
    bool index_is_int64;
    int64_t num_rows;
    int64_t row_bytes;
    uint8_t* out;
    int64_t out_stride;  // bytes
};

// Rows as bytes, so that any payload (NaN patterns included) arrives as it left. Returns -1, or the position of the
// first index outside [0, num_x_rows), in which case nothing was written.
int64_t gather_rows(const GatherRows& args);

struct ReduceColumn {
    const void* rows;
    int64_t num_rows;
    int64_t stride;  // bytes
};

struct ReduceRows {
    const ReduceColumn* columns;
    int num_columns;
    const ReduceColumn* biases;
    int num_biases;
    const int32_t* slots;  // [num_tokens, num_columns], -1 for absent
    int64_t slots_stride;  // elements
    const float* weights;  // [num_tokens, num_columns] or null
    int64_t weights_stride;
    int64_t num_tokens;
    int64_t hidden;
    ElementType in, out_type;
    int round_every;  // columns of a group of a two-level sum, 0 for a plain sum
    void* out;
    int64_t out_stride;  // bytes
};

// Returns -1, or token * num_columns + column of the first slot outside [-1, num_rows of its column); nothing is
// written then.
int64_t reduce_rows(const ReduceRows& args);

}  // namespace deep_ep::cpu
