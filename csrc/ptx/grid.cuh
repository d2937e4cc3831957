// One-line wrappers of the instructions that let a kernel start while the one before it in the stream still runs.
#pragma once

namespace deep_ep::ptx {

// The next kernel of the stream may be launched, if it was enqueued so; it still waits below for this one's end.
__device__ __forceinline__ void launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the kernels before this one in the stream have ended and their writes are visible.
__device__ __forceinline__ void wait_for_earlier_kernels() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace deep_ep::ptx
