#pragma once

#include <cuda_runtime_api.h>

#include "runtime/errors.h"

namespace deep_ep {

// Lets a kernel take more than 48 KB of dynamic shared memory.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes, const char* name) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
}

// Loads a kernel now: loading it at its first launch may wait for kernels that run, which may wait for this rank.
template <class Kernel>
void load_kernel(Kernel* kernel, const char* name) {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), name);
}

// Launches a kernel that may start before the one ahead of it in the stream has ended. The kernel calls
// ptx::wait_for_earlier_kernels() before it reads or writes anything that others use.
template <class... Params, class... Args>
void launch_early(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared_bytes,
                  cudaStream_t stream, const char* name, const Args&... args) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
}

}  // namespace deep_ep
