// Which GPUs this process sees, and whose memory they can map. Free of CUDA headers.
#pragma once

#include <string>
#include <vector>

namespace deep_ep {

// A GPU as its processes know it: the same for every process, whatever CUDA_VISIBLE_DEVICES says.
struct DeviceIdentity {
    std::string uuid;     // 16 bytes
    std::string pci_bus;  // "0000:1b:00.0"
};
DeviceIdentity device_identity(int device);
// What lies between `device` and a visible GPU, or itself.
struct DeviceReach {
    std::string uuid;
    bool can_map;      // its memory
    bool over_nvlink;  // by links with native atomics; itself included
};
std::vector<DeviceReach> device_reach(int device);

}  // namespace deep_ep
