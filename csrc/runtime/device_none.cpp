#include "runtime/device.h"

namespace deep_ep {

bool built_with_cuda() {
    return false;
}
const char* cuda_build_archs() {
    return "";
}
int cuda_runtime_version() {
    return 0;
}
int device_count() {
    return 0;
}

}  // namespace deep_ep
