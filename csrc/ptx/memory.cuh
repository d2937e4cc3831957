// One-line wrappers of memory instructions. What order they give is decided in csrc/sync.
#pragma once

#include <cstdint>

namespace deep_ep::ptx {

__device__ __forceinline__ uint64_t ld_acquire_sys(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void st_release_sys(uint64_t* p, uint64_t v) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

__device__ __forceinline__ void st_relaxed_sys(uint64_t* p, uint64_t v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

__device__ __forceinline__ uint64_t ld_relaxed_sys(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

// Sixteen aligned bytes in one access: whoever loads them so sees all of a store or nothing of it.
__device__ __forceinline__ uint4 ld_relaxed_sys_b128(const void* p) {
    uint64_t low, high;
    asm volatile("{\n\t.reg .b128 v;\n\tld.relaxed.sys.global.b128 v, [%2];\n\tmov.b128 {%0, %1}, v;\n\t}"
                 : "=l"(low), "=l"(high)
                 : "l"(p)
                 : "memory");
    return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
            static_cast<uint32_t>(high >> 32)};
}

__device__ __forceinline__ void st_relaxed_sys_b128(void* p, const uint4& v) {
    const uint64_t low = static_cast<uint64_t>(v.y) << 32 | v.x,
                   high = static_cast<uint64_t>(v.w) << 32 | v.z;
    asm volatile(
        "{\n\t.reg .b128 v;\n\tmov.b128 v, {%1, %2};\n\tst.relaxed.sys.global.b128 [%0], v;\n\t}" ::"l"(p),
        "l"(low), "l"(high)
        : "memory");
}

// The arrival counter of a grid: releases this thread's past, acquires that of the threads that arrived before.
__device__ __forceinline__ uint32_t add_acq_rel_gpu(uint32_t* p, uint32_t v) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}

__device__ __forceinline__ void fence_acq_rel_sys() {
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// Nanoseconds of a clock that all SMs share.
__device__ __forceinline__ uint64_t globaltimer_ns() {
    uint64_t v;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v));
    return v;
}

}  // namespace deep_ep::ptx
