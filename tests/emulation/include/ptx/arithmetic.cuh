// csrc/ptx/arithmetic.cuh on the CPU.
#pragma once

namespace deep_ep::ptx {

inline float rcp_approx(float x) {
    return 1.0f / x;
}

}  // namespace deep_ep::ptx
