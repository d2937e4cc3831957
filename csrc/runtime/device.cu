#include <cuda_runtime_api.h>

#include "runtime/device.h"

namespace deep_ep {

bool built_with_cuda() {
    return true;
}

const char* cuda_build_archs() {
    return DEEP_EP_CUDA_ARCHS;
}

int cuda_runtime_version() {
    int version = 0;
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    cudaGetLastError();  // no driver or no device: an answer, not an error to report later
    return 0;
}

}  // namespace deep_ep
