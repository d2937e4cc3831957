#include "cpu/logfmt.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/row_loops.h"
#include "runtime/parallel.h"

namespace deep_ep::cpu {
namespace {

constexpr int64_t kSideBytes = kLogFmtSideBytes;
constexpr int64_t kGroupBytes = kTile * 10 / 8;

struct Magnitudes {
    uint16_t max, min;
};

// Zeros have a code of their own and do not count as smallest.
Magnitudes group_magnitudes(const uint16_t* x) {
    uint16_t max = 0, min = 0xFFFF;
    for (int i = 0; i < kTile; ++i) {
        const uint16_t magnitude = x[i] & 0x7FFF;
        const uint16_t or_huge = magnitude == 0 ? 0xFFFF : magnitude;
        max = std::max(max, magnitude);
        min = std::min(min, or_huge);
    }
    return {max, std::min(max, min)};
}

LogFmtGroup group_range(Magnitudes m) {
    return LogFmtGroup::of(m.max, m.min);
}

bool chunk_is_cast(const Magnitudes* groups, int64_t count) {
    return std::all_of(groups, groups + count, [](Magnitudes m) { return group_range(m).can_be_cast(); });
}

// 16 codes of 10 bits are 160 bits; four of them are exactly five bytes, lowest bits first.
void pack_codes(const uint16_t* codes, uint8_t* out) {
    for (int i = 0; i < kTile; i += 4, out += 5) {
        const uint64_t bits = static_cast<uint64_t>(codes[i]) | static_cast<uint64_t>(codes[i + 1]) << 10 |
                              static_cast<uint64_t>(codes[i + 2]) << 20 |
                              static_cast<uint64_t>(codes[i + 3]) << 30;
        for (int byte = 0; byte < 5; ++byte) out[byte] = static_cast<uint8_t>(bits >> (8 * byte));
    }
}

void unpack_codes(const uint8_t* in, uint16_t* codes) {
    for (int i = 0; i < kTile; i += 4, in += 5) {
        uint64_t bits = 0;
        for (int byte = 0; byte < 5; ++byte) bits |= static_cast<uint64_t>(in[byte]) << (8 * byte);
        for (int j = 0; j < 4; ++j) codes[i + j] = static_cast<uint16_t>(bits >> (10 * j) & 0x3FF);
    }
}

// Walks one encoded row; `groups` receives its magnitudes. Returns its bytes, or -1 if `available` is too few.
int64_t read_row_header(const uint8_t* row, int64_t available, int64_t hidden,
                        std::vector<Magnitudes>& groups) {
    const int64_t num_groups = hidden / kTile, per_chunk = logfmt_chunk(hidden) / kTile;
    const int64_t side_bytes = num_groups * kSideBytes;
    if (available < side_bytes) return -1;
    groups.resize(static_cast<size_t>(num_groups));
    std::memcpy(groups.data(), row, static_cast<size_t>(side_bytes));
    int64_t bytes = side_bytes;
    for (int64_t group = 0; group < num_groups; group += per_chunk) {
        bytes += per_chunk * (chunk_is_cast(&groups[group], per_chunk) ? kGroupBytes : 2 * kTile);
    }
    return bytes <= available ? bytes : -1;
}

}  // namespace

int64_t logfmt_max_bytes(int64_t num_rows, int64_t hidden) {
    return num_rows * (2 * hidden + (logfmt_travels_plain(hidden) ? 0 : hidden / kTile * kSideBytes));
}

int64_t logfmt_encode(const uint16_t* x, int64_t num_rows, int64_t hidden, uint8_t* out) {
    if (logfmt_travels_plain(hidden)) {
        std::memcpy(out, x, static_cast<size_t>(num_rows * hidden * 2));
        return num_rows * hidden * 2;
    }
    const int64_t num_groups = hidden / kTile, per_chunk = logfmt_chunk(hidden) / kTile;
    // Sizes first, so that rows can be written in parallel, each to its place.
    std::vector<Magnitudes> groups(static_cast<size_t>(num_rows * num_groups));
    std::vector<int64_t> ends(static_cast<size_t>(num_rows));
    parallel_for(num_rows, hidden * 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * num_groups; i < end * num_groups; ++i)
            groups[i] = group_magnitudes(x + i * kTile);
        for (int64_t row = begin; row < end; ++row) {
            int64_t bytes = num_groups * kSideBytes;
            for (int64_t group = 0; group < num_groups; group += per_chunk) {
                const bool cast = chunk_is_cast(&groups[row * num_groups + group], per_chunk);
                bytes += per_chunk * (cast ? kGroupBytes : 2 * kTile);
            }
            ends[row] = bytes;
        }
    });
    for (int64_t row = 1; row < num_rows; ++row) ends[row] += ends[row - 1];
    const auto encode_group = row_loops().logfmt_encode_group;
    parallel_for(num_rows, hidden * 4, [&](int64_t begin, int64_t end) {
        uint16_t codes[kTile];
        for (int64_t row = begin; row < end; ++row) {
            const Magnitudes* row_groups = &groups[row * num_groups];
            uint8_t* target = out + (row == 0 ? 0 : ends[row - 1]);
            std::memcpy(target, row_groups, static_cast<size_t>(num_groups * kSideBytes));
            target += num_groups * kSideBytes;
            for (int64_t chunk = 0; chunk < num_groups; chunk += per_chunk) {
                const uint16_t* values = x + row * hidden + chunk * kTile;
                if (!chunk_is_cast(row_groups + chunk, per_chunk)) {
                    std::memcpy(target, values, static_cast<size_t>(per_chunk * kTile * 2));
                    target += per_chunk * kTile * 2;
                    continue;
                }
                for (int64_t i = 0; i < per_chunk; ++i, target += kGroupBytes) {
                    encode_group(values + i * kTile, group_range(row_groups[chunk + i]), codes);
                    pack_codes(codes, target);
                }
            }
        }
    });
    return num_rows == 0 ? 0 : ends.back();
}

int64_t logfmt_count_rows(const uint8_t* payload, int64_t bytes, int64_t hidden) {
    if (logfmt_travels_plain(hidden)) return bytes % (2 * hidden) == 0 ? bytes / (2 * hidden) : -1;
    std::vector<Magnitudes> groups;
    int64_t rows = 0;
    for (int64_t at = 0; at < bytes; ++rows) {
        const int64_t row_bytes = read_row_header(payload + at, bytes - at, hidden, groups);
        if (row_bytes < 0) return -1;
        at += row_bytes;
    }
    return rows;
}

void logfmt_decode(const uint8_t* payload, int64_t num_rows, int64_t hidden, uint16_t* out) {
    if (logfmt_travels_plain(hidden)) {
        std::memcpy(out, payload, static_cast<size_t>(num_rows * hidden * 2));
        return;
    }
    const int64_t num_groups = hidden / kTile, per_chunk = logfmt_chunk(hidden) / kTile;
    std::vector<Magnitudes> groups;
    std::vector<int64_t> begins(static_cast<size_t>(num_rows));
    int64_t at = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
        begins[row] = at;
        at += read_row_header(payload + at, INT64_MAX, hidden, groups);
    }
    const auto decode_group = row_loops().logfmt_decode_group;
    parallel_for(num_rows, hidden * 4, [&](int64_t begin, int64_t end) {
        std::vector<Magnitudes> row_groups;
        uint16_t codes[kTile];
        for (int64_t row = begin; row < end; ++row) {
            const uint8_t* source = payload + begins[row];
            read_row_header(source, INT64_MAX, hidden, row_groups);
            source += num_groups * kSideBytes;
            uint16_t* values = out + row * hidden;
            for (int64_t chunk = 0; chunk < num_groups; chunk += per_chunk, values += per_chunk * kTile) {
                if (!chunk_is_cast(&row_groups[chunk], per_chunk)) {
                    std::memcpy(values, source, static_cast<size_t>(per_chunk * kTile * 2));
                    source += per_chunk * kTile * 2;
                    continue;
                }
                for (int64_t i = 0; i < per_chunk; ++i, source += kGroupBytes) {
                    unpack_codes(source, codes);
                    decode_group(codes, group_range(row_groups[chunk + i]), values + i * kTile);
                }
            }
        }
    });
}

}  // namespace deep_ep::cpu
