#include "cpu/rows.h"

#include <cstring>
#include <vector>

#include "cpu/row_loops.h"
#include "runtime/parallel.h"

namespace deep_ep::cpu {
namespace {

template <class Index>
int64_t first_outside(const Index* index, int64_t count, int64_t limit) {
    // One pass without branches for the usual case, a second one only to name the culprit. Unsigned: catches negatives.
    bool bad = false;
    for (int64_t i = 0; i < count; ++i) {
        bad |= static_cast<uint64_t>(static_cast<int64_t>(index[i])) >= static_cast<uint64_t>(limit);
    }
    if (!bad) return -1;
    int64_t i = 0;
    while (static_cast<uint64_t>(static_cast<int64_t>(index[i])) < static_cast<uint64_t>(limit)) ++i;
    return i;
}

// A copy whose length the compiler knows is a few instructions; top-k weights and scales are such rows.
template <int64_t kBytes, class Index>
void copy_rows(const GatherRows& args, const Index* index, int64_t begin, int64_t end) {
    const int64_t bytes = kBytes > 0 ? kBytes : args.row_bytes;
    for (int64_t i = begin; i < end; ++i) {
        std::memcpy(args.out + i * args.out_stride, args.x + static_cast<int64_t>(index[i]) * args.x_stride,
                    static_cast<size_t>(bytes));
    }
}

template <class Index>
int64_t gather(const GatherRows& args) {
    const auto* index = static_cast<const Index*>(args.index);
    const int64_t bad = first_outside(index, args.num_rows, args.num_x_rows);
    if (bad >= 0 || args.row_bytes == 0) return bad;
    parallel_for(args.num_rows, 2 * args.row_bytes, [&](int64_t begin, int64_t end) {
        switch (args.row_bytes) {
            case 4:
                return copy_rows<4>(args, index, begin, end);
            case 8:
                return copy_rows<8>(args, index, begin, end);
            case 16:
                return copy_rows<16>(args, index, begin, end);
            case 32:
                return copy_rows<32>(args, index, begin, end);
            case 64:
                return copy_rows<64>(args, index, begin, end);
            default:
                return copy_rows<0>(args, index, begin, end);
        }
    });
    return -1;
}

int64_t first_bad_slot(const ReduceRows& args) {
    for (int64_t token = 0; token < args.num_tokens; ++token) {
        const int32_t* slots = args.slots + token * args.slots_stride;
        for (int column = 0; column < args.num_columns; ++column) {
            if (slots[column] < -1 || slots[column] >= args.columns[column].num_rows) {
                return token * args.num_columns + column;
            }
        }
    }
    return -1;
}

const void* row_of(const ReduceColumn& column, int64_t row) {
    return static_cast<const uint8_t*>(column.rows) + row * column.stride;
}

}  // namespace

int64_t gather_rows(const GatherRows& args) {
    return args.index_is_int64 ? gather<int64_t>(args) : gather<int32_t>(args);
}

int64_t reduce_rows(const ReduceRows& args) {
    const int64_t bad = first_bad_slot(args);
    if (bad >= 0 || args.hidden == 0) return bad;
    const auto reduce_row =
        row_loops().reduce_row[static_cast<int>(args.in)][static_cast<int>(args.out_type)];
    const int64_t token_bytes = args.hidden * (element_bytes(args.in) * (args.num_columns + args.num_biases) +
                                               element_bytes(args.out_type));
    parallel_for(args.num_tokens, token_bytes, [&](int64_t begin, int64_t end) {
        std::vector<RowTerm> terms(static_cast<size_t>(args.num_columns));
        std::vector<RowTerm> biases(static_cast<size_t>(args.num_biases));
        for (int64_t token = begin; token < end; ++token) {
            int num_terms = 0;
            for (int column = 0; column < args.num_columns; ++column) {
                const int32_t slot = args.slots[token * args.slots_stride + column];
                if (slot >= 0) {
                    const float weight =
                        args.weights == nullptr ? 1.0f : args.weights[token * args.weights_stride + column];
                    terms[num_terms++] = {row_of(args.columns[column], slot), weight, false};
                }
                // The last present column of a group closes it, whichever columns of the group are absent.
                const bool group_ends = args.round_every > 0 && ((column + 1) % args.round_every == 0 ||
                                                                 column + 1 == args.num_columns);
                if (group_ends && num_terms > 0) terms[num_terms - 1].closes_group = true;
            }
            for (int i = 0; i < args.num_biases; ++i)
                biases[i] = {row_of(args.biases[i], token), 1.0f, false};
            auto* out = static_cast<uint8_t*>(args.out) + token * args.out_stride;
            reduce_row({biases.data(), args.num_biases, terms.data(), num_terms, args.round_every > 0,
                        args.hidden, out});
        }
    });
    return -1;
}

}  // namespace deep_ep::cpu
