// See isa_avx2.cpp for why the headers come first.
#include <cstring>

#include "cpu/row_loops.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
// GCC 12 takes the undefined vectors inside its own intrinsics for a mistake of the caller.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define DEEP_EP_VECTOR_BYTES 64
#define DEEP_EP_WIDEN_U16(v) _mm512_cvtepu16_epi32((__m256i)(v))
#define DEEP_EP_WIDEN_U8(v) _mm512_cvtepu8_epi32((__m128i)(v))
#define DEEP_EP_NARROW_U16(v) _mm512_cvtepi32_epi16((__m512i)(v))
#define DEEP_EP_NARROW_U8(v) _mm512_cvtepi32_epi8((__m512i)(v))
#define DEEP_EP_LOOPS_NAME "avx512"
namespace deep_ep::cpu::avx512 {
#include "cpu/row_loops.inl"
}  // namespace deep_ep::cpu::avx512
const deep_ep::cpu::RowLoops deep_ep::cpu::kAvx512Loops = deep_ep::cpu::avx512::kLoops;
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
