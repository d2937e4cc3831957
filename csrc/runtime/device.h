// What this build and this machine know of CUDA. A build without nvcc has the same functions (device_none.cpp).
#pragma once

namespace deep_ep {

bool built_with_cuda();
const char* cuda_build_archs();  // e.g. "90;90-ptx", "" without CUDA
int cuda_runtime_version();      // of the runtime linked in, e.g. 13000; 0 without CUDA
int device_count();              // 0 without a driver or a device; never throws

}  // namespace deep_ep
