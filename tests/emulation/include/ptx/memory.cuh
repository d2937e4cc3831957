// csrc/ptx/memory.cuh on the CPU. What polls lets the other lanes run.
#pragma once

#include <mutex>

#include "cuda_on_cpu.h"

namespace deep_ep::ptx {

inline uint64_t ld_acquire_sys(const uint64_t* p) {
    emulated::yield();
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline uint64_t ld_acquire_gpu(const uint64_t* p) {
    return ld_acquire_sys(p);
}
inline uint64_t ld_relaxed_sys(const uint64_t* p) {
    return ld_acquire_sys(p);
}
inline void st_release_sys(uint64_t* p, uint64_t v) {
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
inline void st_release_gpu(uint64_t* p, uint64_t v) {
    st_release_sys(p, v);
}
inline void st_relaxed_sys(uint64_t* p, uint64_t v) {
    st_release_sys(p, v);
}
inline uint32_t add_acq_rel_gpu(uint32_t* p, uint32_t v) {
    return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
inline void fence_acq_rel_sys() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// Sixteen bytes at once.
inline std::mutex& b128_lock() {
    static std::mutex lock;
    return lock;
}
inline uint4 ld_relaxed_sys_b128(const void* p) {
    emulated::yield();
    const std::lock_guard<std::mutex> held(b128_lock());
    uint4 v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
inline void st_relaxed_sys_b128(void* p, const uint4& v) {
    const std::lock_guard<std::mutex> held(b128_lock());
    std::memcpy(p, &v, sizeof(v));
}

// A line is seen whole: its last lane, whose word says so, stores after the others, and loads before them.
inline bool is_last_of_line() {
    return emulated::lane_index() % 8 == 7;
}
inline void st_line(void* p, const uint4& v, bool is_active) {
    if (is_active && !is_last_of_line()) st_relaxed_sys_b128(p, v);
    __syncwarp();
    if (is_active && is_last_of_line()) st_relaxed_sys_b128(p, v);
}
inline uint4 ld_line(const void* p, bool is_active) {
    uint4 v{};
    if (is_active && is_last_of_line()) v = ld_relaxed_sys_b128(p);
    __syncwarp();
    if (is_active && !is_last_of_line()) v = ld_relaxed_sys_b128(p);
    return v;
}

inline uint64_t globaltimer_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

}  // namespace deep_ep::ptx
