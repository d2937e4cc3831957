// LogFMT-10 rows on the CPU. The format stands in deep_ep/logfmt.py.
#pragma once

#include <cstdint>

namespace deep_ep::cpu {

// Bytes that `num_rows` contiguous bf16 rows take at most: every chunk plain, plus the magnitudes.
int64_t logfmt_max_bytes(int64_t num_rows, int64_t hidden);

// Writes the rows one after the other and returns the bytes used. `out` holds logfmt_max_bytes.
int64_t logfmt_encode(const uint16_t* x, int64_t num_rows, int64_t hidden, uint8_t* out);

// Rows in the payload, or -1 if it does not end with a row.
int64_t logfmt_count_rows(const uint8_t* payload, int64_t bytes, int64_t hidden);

// `out` holds the rows that logfmt_count_rows found.
void logfmt_decode(const uint8_t* payload, int64_t num_rows, int64_t hidden, uint16_t* out);

}  // namespace deep_ep::cpu
