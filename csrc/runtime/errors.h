// Failures of CUDA calls and launches as exceptions. bindings.cpp turns them into Python's RuntimeError.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace deep_ep {

inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string("deep_ep: ") + what + ": " + cudaGetErrorName(status) + " (" +
                             cudaGetErrorString(status) + ")");
}

// After a launch. Reads the error, so that it is not reported a second time by an unrelated call.
inline void check_launch(const char* kernel) {
    check_cuda(cudaGetLastError(), kernel);
}

// A size that a kernel's arithmetic or the launch grid cannot hold. A std::invalid_argument becomes ValueError.
inline void check_limit(int64_t value, int64_t limit, const char* kernel, const char* what) {
    if (value >= 0 && value <= limit) return;
    throw std::invalid_argument(std::string("deep_ep: ") + kernel + ": " + what + " is " +
                                std::to_string(value) + ", expected 0 to " + std::to_string(limit) +
                                "; split the call");
}

}  // namespace deep_ep
