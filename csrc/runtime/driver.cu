#include "runtime/driver.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "runtime/errors.h"

namespace deep_ep {
namespace {

constexpr unsigned int kDriverVersion =
    12000;  // the oldest driver served; each function in its form of that time

template <class Function>
void look_up(const char* name, Function& function) {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion(name, &address, kDriverVersion, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found);
#endif
    if (status != cudaSuccess) cudaGetLastError();  // reported here, not by the next unrelated call
    check_cuda(status, name);
    if (found != cudaDriverEntryPointSuccess || address == nullptr) {
        throw std::runtime_error(std::string("deep_ep: the CUDA driver has no ") + name +
                                 "; a driver for CUDA 12.0 or later is needed");
    }
    function = reinterpret_cast<Function>(address);
}

Driver load() {
    Driver d{};
    look_up("cuGetErrorName", d.get_error_name);
    look_up("cuGetErrorString", d.get_error_string);
    look_up("cuInit", d.init);
    look_up("cuDeviceGet", d.device_get);
    look_up("cuDeviceGetCount", d.device_get_count);
    look_up("cuDeviceGetUuid", d.device_get_uuid);
    look_up("cuDeviceGetPCIBusId", d.device_get_pci_bus_id);
    look_up("cuDeviceGetAttribute", d.device_get_attribute);
    look_up("cuDeviceCanAccessPeer", d.device_can_access_peer);
    look_up("cuDeviceGetP2PAttribute", d.device_get_p2p_attribute);
    look_up("cuDeviceTotalMem", d.device_total_mem);
    look_up("cuDevicePrimaryCtxRetain", d.primary_ctx_retain);
    look_up("cuDevicePrimaryCtxRelease", d.primary_ctx_release);
    look_up("cuCtxPushCurrent", d.ctx_push_current);
    look_up("cuCtxPopCurrent", d.ctx_pop_current);
    look_up("cuCtxSynchronize", d.ctx_synchronize);
    look_up("cuMemGetAllocationGranularity", d.mem_get_allocation_granularity);
    look_up("cuMemAddressReserve", d.mem_address_reserve);
    look_up("cuMemAddressFree", d.mem_address_free);
    look_up("cuMemCreate", d.mem_create);
    look_up("cuMemRelease", d.mem_release);
    look_up("cuMemMap", d.mem_map);
    look_up("cuMemUnmap", d.mem_unmap);
    look_up("cuMemSetAccess", d.mem_set_access);
    look_up("cuMemExportToShareableHandle", d.mem_export);
    look_up("cuMemImportFromShareableHandle", d.mem_import);
    look_up("cuMemAlloc", d.mem_alloc);
    look_up("cuMemFree", d.mem_free);
    look_up("cuMemsetD8", d.memset_d8);
    look_up("cuIpcGetMemHandle", d.ipc_get_mem_handle);
    look_up("cuIpcOpenMemHandle", d.ipc_open_mem_handle);
    look_up("cuIpcCloseMemHandle", d.ipc_close_mem_handle);
    look_up("cuStreamWaitValue64", d.stream_wait_value);
    look_up("cuStreamWriteValue64", d.stream_write_value);
    const CUresult status = d.init(0);
    if (status != CUDA_SUCCESS) {
        const char* name = nullptr;
        d.get_error_name(status, &name);
        throw std::runtime_error(std::string("deep_ep: cuInit: ") + (name ? name : "unknown error"));
    }
    return d;
}

}  // namespace

const Driver& driver() {
    static const Driver loaded = load();  // a failure throws, and the next call tries again
    return loaded;
}

void check_driver(CUresult status, const char* what) {
    if (status == CUDA_SUCCESS) return;
    const char* name = nullptr;
    const char* text = nullptr;
    driver().get_error_name(status, &name);
    driver().get_error_string(status, &text);
    throw std::runtime_error(std::string("deep_ep: ") + what + ": " + (name ? name : "unknown CUDA error") +
                             " (" + (text ? text : std::to_string(static_cast<int>(status)).c_str()) + ")");
}

ContextScope::ContextScope(CUcontext context) {
    check_driver(driver().ctx_push_current(context), "cuCtxPushCurrent");
}

ContextScope::~ContextScope() {
    CUcontext popped = nullptr;
    driver().ctx_pop_current(&popped);
}

}  // namespace deep_ep
