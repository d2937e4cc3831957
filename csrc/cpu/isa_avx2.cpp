// Headers come before the target pragma, and the loops use no standard-library template: an inline function of the
// library compiled for AVX could otherwise be the copy that the linker keeps for every caller.
#include <cstring>

#include "cpu/row_loops.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define DEEP_EP_VECTOR_BYTES 32
#define DEEP_EP_WIDEN_U16(v) _mm256_cvtepu16_epi32((__m128i)(v))
#define DEEP_EP_WIDEN_U8(v) _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)(v)))
// packus works within 128-bit halves; the permutation brings the two low quarters together. Values are below 65536.
#define DEEP_EP_NARROW_U16(v) \
    _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)(v), (__m256i)(v)), 0x08))
#define DEEP_EP_NARROW_U8(v) narrow_bytes((__m256i)(v))
#define DEEP_EP_LOOPS_NAME "avx2"
namespace deep_ep::cpu::avx2 {
static inline __attribute__((always_inline)) long long narrow_bytes(__m256i v) {
    const __m256i pairs = _mm256_packus_epi32(v, v);
    const __m256i bytes = _mm256_packus_epi16(pairs, pairs);  // lanes 0-3 repeated, then lanes 4-7 repeated
    return _mm_cvtsi128_si64(
        _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
#include "cpu/row_loops.inl"
}  // namespace deep_ep::cpu::avx2
const deep_ep::cpu::RowLoops deep_ep::cpu::kAvx2Loops = deep_ep::cpu::avx2::kLoops;
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
