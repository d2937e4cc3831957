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

__device__ __forceinline__ uint64_t ld_acquire_gpu(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void st_release_gpu(uint64_t* p, uint64_t v) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
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
//
// ptxas (seen with 13.0) drops the words of such a load that nobody uses, and then loads the others one by one. So all of
// them are used: the last one depends on them by way of blockIdx.z, which is 0 in these grids, but not to its knowledge.
__device__ __forceinline__ uint4 ld_relaxed_sys_b128(const void* p) {
    uint64_t low, high;
    asm volatile("{\n\t.reg .b128 v;\n\tld.relaxed.sys.global.b128 v, [%2];\n\tmov.b128 {%0, %1}, v;\n\t}"
                 : "=l"(low), "=l"(high)
                 : "l"(p)
                 : "memory");
    uint4 v{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
            static_cast<uint32_t>(high >> 32)};
    v.w |= (v.x ^ v.y ^ v.z) & blockIdx.z;
    return v;
}

__device__ __forceinline__ void st_relaxed_sys_b128(void* p, const uint4& v) {
    const uint64_t low = static_cast<uint64_t>(v.y) << 32 | v.x,
                   high = static_cast<uint64_t>(v.w) << 32 | v.z;
    asm volatile(
        "{\n\t.reg .b128 v;\n\tmov.b128 v, {%1, %2};\n\tst.relaxed.sys.global.b128 [%0], v;\n\t}" ::"l"(p),
        "l"(low), "l"(high)
        : "memory");
}

// A line: 128 aligned bytes, of which eight neighbouring lanes store or load 16 each in one instruction. Such an access is one
// transaction, in memory and over NVLink: whoever loads a line sees all of a store to it or nothing of it. The PTX memory
// model promises that for a lane's 16 bytes only; for lines it is a property of the hardware, on which NCCL's LL128 protocol
// relies as well, and which a test asks for. By all lanes of a warp; is_active: the same for the lanes of a line.
__device__ __forceinline__ void st_line(void* p, const uint4& v, bool is_active) {
    if (is_active) st_relaxed_sys_b128(p, v);
}
__device__ __forceinline__ uint4 ld_line(const void* p, bool is_active) {
    return is_active ? ld_relaxed_sys_b128(p) : uint4{};
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
