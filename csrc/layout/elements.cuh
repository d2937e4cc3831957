// Element types on the device: widening to FP32 and rounding from it, with the bits of csrc/cpu/row_loops.inl.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "layout/fp8_format.h"
#include "ptx/arithmetic.cuh"

namespace deep_ep {

// Every NaN is written as one pattern; the conversion instructions would give 0x7FFF.
__device__ __forceinline__ bool is_nan(float v) {
    return v != v;
}

struct Bf16 {
    using Storage = uint16_t;
    __device__ static __forceinline__ float widen(Storage v) {
        return __uint_as_float(static_cast<uint32_t>(v) << 16);
    }
    __device__ static __forceinline__ void widen_pair(uint32_t word, float& low, float& high) {
        low = __uint_as_float(word << 16);
        high = __uint_as_float(word & 0xFFFF0000u);
    }
    __device__ static __forceinline__ Storage round(float v) {
        return is_nan(v) ? uint16_t{0x7FC0} : __bfloat16_as_ushort(__float2bfloat16_rn(v));
    }
};

struct Fp16 {
    using Storage = uint16_t;
    __device__ static __forceinline__ float widen(Storage v) { return __half2float(__ushort_as_half(v)); }
    __device__ static __forceinline__ void widen_pair(uint32_t word, float& low, float& high) {
        const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
        low = both.x;
        high = both.y;
    }
    __device__ static __forceinline__ Storage round(float v) {
        return is_nan(v) ? uint16_t{0x7E00} : __half_as_ushort(__float2half_rn(v));
    }
};

struct Fp32 {
    using Storage = float;
    __device__ static __forceinline__ float widen(Storage v) { return v; }
    __device__ static __forceinline__ Storage round(float v) {
        return is_nan(v) ? __uint_as_float(0x7FC00000u) : v;
    }
};

// Nearest even, saturating at 448; a NaN of either sign becomes 0x7F.
__device__ __forceinline__ uint8_t to_e4m3(float v) {
    return is_nan(v) ? uint8_t{0x7F} : __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ float from_e4m3(uint8_t code) {
    const __half_raw half = __nv_cvt_fp8_to_halfraw(code, __NV_E4M3);  // every E4M3 value is a half
    return __half2float(__half(half));
}

struct TileScale {
    float scale, inverse;
};

// The rule of deep_ep/fp8.py: single IEEE operations, never contracted or approximated.
__device__ __forceinline__ TileScale tile_scale(float amax, bool pow2) {
    amax = fmaxf(amax, kAmaxFloor);
    float scale = __fdiv_rn(amax, kE4m3Max);
    if (!pow2) return {scale, __fdiv_rn(kE4m3Max, amax)};
    scale = __uint_as_float((__float_as_uint(scale) + 0x7FFFFFu) & 0x7F800000u);
    return {scale, __fdiv_rn(1.0f, scale)};
}

// The same up to this magnitude, without a branch: quotients by Newton's method end with a correction by their remainder, and
// nothing on the way leaves the range of normal numbers, so they have the bits of divisions.
constexpr float kPlainAmax = 0x1p100f;
__device__ __forceinline__ TileScale plain_tile_scale(float amax, bool pow2) {
    constexpr float kOneOver = 1.0f / kE4m3Max;
    amax = fmaxf(amax, kAmaxFloor);
    const float guess = __fmul_rn(amax, kOneOver);
    const float scale = __fmaf_rn(kOneOver, __fmaf_rn(-kE4m3Max, guess, amax), guess);
    float one_over = ptx::rcp_approx(amax);
    one_over = __fmaf_rn(one_over, __fmaf_rn(-amax, one_over, 1.0f), one_over);
    const float inverse = __fmul_rn(kE4m3Max, one_over);
    if (!pow2) return {scale, __fmaf_rn(one_over, __fmaf_rn(-amax, inverse, kE4m3Max), inverse)};
    // 2^e and 2^-e: their biased exponents add up to 254.
    const uint32_t bits = (__float_as_uint(scale) + 0x7FFFFFu) & 0x7F800000u;
    return {__uint_as_float(bits), __uint_as_float((254u << 23) - bits)};
}

// kCount elements whose address is a multiple of their common size: one load or store of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
    T v[kCount];
};

// Widens a vector.
template <class Type, int kCount>
__device__ __forceinline__ void widen_vector(const Pack<typename Type::Storage, kCount>& from,
                                             float (&to)[kCount]) {
    if constexpr (sizeof(typename Type::Storage) == 2 && kCount == 8) {
        // By words: half of the instructions that taking out single 16-bit values costs.
        const uint4 words = *reinterpret_cast<const uint4*>(&from);
        const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) Type::widen_pair(w[i], to[2 * i], to[2 * i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) to[i] = Type::widen(from.v[i]);
    }
}

// The largest magnitude of 16-bit values, two at a time. NaN is ignored.
template <class Type>
struct Magnitude {
    float value = 0.0f;
    template <int kCount>
    __device__ __forceinline__ void add(const Pack<typename Type::Storage, kCount>& part) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) value = fmaxf(value, fabsf(Type::widen(part.v[i])));
    }
    __device__ __forceinline__ float get() const { return value; }
};

template <>
struct Magnitude<Bf16> {
    __nv_bfloat162 value{__ushort_as_bfloat16(0), __ushort_as_bfloat16(0)};
    __device__ __forceinline__ void add(const Pack<uint16_t, 8>& part) {
        const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&part);
#pragma unroll
        for (int i = 0; i < 4; ++i) value = __hmax2(value, __habs2(pairs[i]));
    }
    __device__ __forceinline__ float get() const { return fmaxf(__low2float(value), __high2float(value)); }
};

template <>
struct Magnitude<Fp16> {
    __half2 value{__ushort_as_half(0), __ushort_as_half(0)};
    __device__ __forceinline__ void add(const Pack<uint16_t, 8>& part) {
        const auto* pairs = reinterpret_cast<const __half2*>(&part);
#pragma unroll
        for (int i = 0; i < 4; ++i) value = __hmax2(value, __habs2(pairs[i]));
    }
    __device__ __forceinline__ float get() const { return fmaxf(__low2float(value), __high2float(value)); }
};

// Rounds vectors with the bits of Type::round. For bf16, NaN is looked for once in all of them: round() leaves the pattern
// of the conversion instruction, 0x7FFF, and settle() puts 0x7FC0 in its place where any was seen.
template <class Type, int kCount>
struct VectorRounder {
    using Result = Pack<typename Type::Storage, kCount>;
    __device__ __forceinline__ Result sum_of_two(const Result& a, const Result& b) {
        Result result;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            result.v[i] = Type::round(__fadd_rn(__fadd_rn(0.0f, Type::widen(a.v[i])), Type::widen(b.v[i])));
        }
        return result;
    }
    __device__ __forceinline__ Result round(const float (&v)[kCount]) {
        Result result;
#pragma unroll
        for (int i = 0; i < kCount; ++i) result.v[i] = Type::round(v[i]);
        return result;
    }
    __device__ __forceinline__ bool saw_nan() const { return false; }
    __device__ __forceinline__ Result settle(const Result& result) const { return result; }
};

template <>
struct VectorRounder<Bf16, 8> {
    using Result = Pack<uint16_t, 8>;
    __nv_bfloat162 largest{__ushort_as_bfloat16(0), __ushort_as_bfloat16(0)};  // NaN once one was seen

    // (0 + a) + b in FP32, rounded to bf16. One packed addition has the same bits: where FP32 cannot hold a + b, one of them
    // is 2^-16 of the other or less, too little to bring the sum near the middle of two bf16 values. Adding +0 then stands for
    // the 0 that the sum begins with: it turns -0 into +0 and changes nothing else.
    __device__ __forceinline__ Result sum_of_two(const Result& a, const Result& b) {
        Result result;
        auto* sums = reinterpret_cast<__nv_bfloat162*>(&result);
        const auto* left = reinterpret_cast<const __nv_bfloat162*>(&a);
        const auto* right = reinterpret_cast<const __nv_bfloat162*>(&b);
        const __nv_bfloat162 zero{__ushort_as_bfloat16(0), __ushort_as_bfloat16(0)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[i] = __hadd2_rn(__hadd2_rn(left[i], right[i]), zero);
            largest = __hmax2_nan(largest, sums[i]);
        }
        return result;
    }
    __device__ __forceinline__ Result round(const float (&v)[8]) {
        Result result;
        auto* pairs = reinterpret_cast<__nv_bfloat162*>(&result);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pairs[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
            largest = __hmax2_nan(largest, pairs[i]);
        }
        return result;
    }
    __device__ __forceinline__ bool saw_nan() const { return !__hbeq2(largest, largest); }
    __device__ __forceinline__ Result settle(const Result& result) const {
        Result settled;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            settled.v[i] = result.v[i] == 0x7FFF ? static_cast<uint16_t>(0x7FC0) : result.v[i];
        return settled;
    }
};

template <int kBytes, class T>
__device__ __host__ __forceinline__ bool is_aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % kBytes == 0;
}

}  // namespace deep_ep
