// csrc/runtime/kernel_attributes.h on the CPU: launches, and nothing to load.
#pragma once

#include "cuda_on_cpu.h"
#include "runtime/errors.h"

using cudaStream_t = struct CUstream_st*;

namespace deep_ep {

template <class Kernel>
void load_kernel(Kernel*, const char*) {}

template <class... Params, class... Args>
void launch_emulated(bool starts_early, void (*kernel)(Params...), unsigned blocks, unsigned threads,
                     size_t shared_bytes, cudaStream_t stream, const Args&... args) {
    emulated::launch(*reinterpret_cast<emulated::Stream*>(stream), blocks, threads, shared_bytes,
                     starts_early, [=] { kernel(static_cast<Params>(args)...); });
}

template <class... Params, class... Args>
void launch_early(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared_bytes,
                  cudaStream_t stream, const char*, const Args&... args) {
    launch_emulated(true, kernel, blocks, threads, shared_bytes, stream, args...);
}

inline void check_launch(const char*) {}

}  // namespace deep_ep
