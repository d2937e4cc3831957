// One-line wrappers of arithmetic instructions.
#pragma once

namespace deep_ep::ptx {

// 1 / x for normal x, to one unit in the last place.
__device__ __forceinline__ float rcp_approx(float x) {
    float v;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(x));
    return v;
}

}  // namespace deep_ep::ptx
