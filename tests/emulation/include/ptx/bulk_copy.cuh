// Of csrc/ptx/bulk_copy.cuh on the CPU, the barriers that count arrivals alone.
#pragma once

#include "cuda_on_cpu.h"

namespace deep_ep::ptx {

// From the lowest bits: arrivals that are missing, the phase's parity, arrivals of a phase.
constexpr uint64_t kArrivals = (1u << 20) - 1, kParity = 1u << 20;
constexpr int kAllAt = 32;

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    *barrier = static_cast<uint64_t>(arrivals) << kAllAt | arrivals;
}
// The lanes of a block run in turns, so nothing comes between.
inline void mbarrier_arrive(uint64_t* barrier) {
    --*barrier;
    if ((*barrier & kArrivals) == 0) *barrier = (*barrier ^ kParity) | *barrier >> kAllAt;
}
inline bool mbarrier_test_wait(uint64_t* barrier, uint32_t parity) {
    if (((*barrier & kParity) != 0) != (parity != 0)) return true;
    emulated::yield();
    return false;
}
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    return mbarrier_test_wait(barrier, parity);
}
inline void fence_proxy_async() {}
inline void fence_proxy_async_shared() {}

}  // namespace deep_ep::ptx
