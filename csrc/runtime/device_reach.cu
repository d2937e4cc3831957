#include "runtime/device_reach.h"

#include "runtime/driver.h"

namespace deep_ep {

DeviceIdentity device_identity(int device) {
    const Driver& d = driver();
    CUdevice cu_device = 0;
    check_driver(d.device_get(&cu_device, device), "cuDeviceGet");
    CUuuid uuid;
    check_driver(d.device_get_uuid(&uuid, cu_device), "cuDeviceGetUuid");
    char bus[32] = {0};
    check_driver(d.device_get_pci_bus_id(bus, sizeof(bus), cu_device), "cuDeviceGetPCIBusId");
    return {std::string(uuid.bytes, sizeof(uuid.bytes)), bus};
}

std::vector<DeviceReach> device_reach(int device) {
    const Driver& d = driver();
    CUdevice own = 0;
    check_driver(d.device_get(&own, device), "cuDeviceGet");
    int count = 0;
    check_driver(d.device_get_count(&count), "cuDeviceGetCount");
    std::vector<DeviceReach> reach;
    for (int other = 0; other < count; ++other) {
        int can_access = other == device, has_atomics = other == device;
        if (other != device) {
            CUdevice peer = 0;
            check_driver(d.device_get(&peer, other), "cuDeviceGet");
            check_driver(d.device_can_access_peer(&can_access, own, peer), "cuDeviceCanAccessPeer");
            check_driver(d.device_get_p2p_attribute(
                             &has_atomics, CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED, own, peer),
                         "cuDeviceGetP2PAttribute");
        }
        reach.push_back({device_identity(other).uuid, can_access != 0, can_access != 0 && has_atomics != 0});
    }
    return reach;
}

}  // namespace deep_ep
