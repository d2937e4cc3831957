#pragma once

#include <cuda_runtime_api.h>

#include "runtime/errors.h"

namespace deep_ep {

// Lets a kernel take more than 48 KB of dynamic shared memory.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes, const char* name) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
}

}  // namespace deep_ep
