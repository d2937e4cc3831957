// Element types on the device: widening to FP32 and rounding from it, with the bits of csrc/cpu/row_loops.inl.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "layout/fp8_format.h"

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
    __device__ static __forceinline__ Storage round(float v) {
        return is_nan(v) ? uint16_t{0x7FC0} : __bfloat16_as_ushort(__float2bfloat16_rn(v));
    }
};

struct Fp16 {
    using Storage = uint16_t;
    __device__ static __forceinline__ float widen(Storage v) { return __half2float(__ushort_as_half(v)); }
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

// kCount elements whose address is a multiple of their common size: one load or store of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
    T v[kCount];
};

// Rounds a vector with the bits of Type::round. NaN is rare, so it is looked for once in all elements: a sum of them is NaN
// if one of them is (infinities of both signs make it NaN too, and take the slow way to the same result).
template <class Type, int kCount>
__device__ __forceinline__ Pack<typename Type::Storage, kCount> round_all(const float (&v)[kCount]) {
    Pack<typename Type::Storage, kCount> result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.v[i] = Type::round(v[i]);
    return result;
}

template <>
__device__ __forceinline__ Pack<uint16_t, 8> round_all<Bf16, 8>(const float (&v)[8]) {
    Pack<uint16_t, 8> result;
    const float probe = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    if (is_nan(probe)) {
#pragma unroll
        for (int i = 0; i < 8; ++i) result.v[i] = Bf16::round(v[i]);
        return result;
    }
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(&result);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    return result;
}

template <int kBytes, class T>
__device__ __host__ __forceinline__ bool is_aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % kBytes == 0;
}

}  // namespace deep_ep
