// csrc/ptx/grid.cuh on the CPU.
#pragma once

#include "cuda_on_cpu.h"

namespace deep_ep::ptx {

inline void launch_dependents() {
    emulated::block->let_next_begin();
}
inline void wait_for_earlier_kernels() {
    const emulated::Launch* ahead = emulated::block->launch->ahead.get();
    while (ahead != nullptr && !ahead->has_ended()) emulated::yield();
}

}  // namespace deep_ep::ptx
