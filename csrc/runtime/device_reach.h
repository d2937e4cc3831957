// Which GPUs this process sees, and whose memory they can map. Free of CUDA headers.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace deep_ep {

// A GPU as its processes know it: the same for every process, whatever CUDA_VISIBLE_DEVICES says.
struct DeviceIdentity {
    std::string uuid;     // 16 bytes
    std::string pci_bus;  // "0000:1b:00.0"
};
DeviceIdentity device_identity(int device);
// For each visible GPU: its UUID, and whether `device` can map its memory (itself included).
std::vector<std::pair<std::string, bool>> device_reach(int device);

}  // namespace deep_ep
