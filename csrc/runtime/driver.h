// The CUDA driver's functions for mapping memory between processes, looked up at first use through the runtime that is
// linked in: the extension has no link against libcuda and imports where there is no driver.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

namespace deep_ep {

struct Driver {
    PFN_cuGetErrorName_v6000 get_error_name;
    PFN_cuGetErrorString_v6000 get_error_string;
    PFN_cuInit_v2000 init;
    PFN_cuDeviceGet_v2000 device_get;
    PFN_cuDeviceGetCount_v2000 device_get_count;
    PFN_cuDeviceGetUuid_v11040 device_get_uuid;
    PFN_cuDeviceGetPCIBusId_v4010 device_get_pci_bus_id;
    PFN_cuDeviceGetAttribute_v2000 device_get_attribute;
    PFN_cuDeviceCanAccessPeer_v4000 device_can_access_peer;
    PFN_cuDeviceGetP2PAttribute_v8000 device_get_p2p_attribute;
    PFN_cuDeviceTotalMem_v3020 device_total_mem;
    PFN_cuDevicePrimaryCtxRetain_v7000 primary_ctx_retain;
    PFN_cuDevicePrimaryCtxRelease_v11000 primary_ctx_release;
    PFN_cuCtxPushCurrent_v4000 ctx_push_current;
    PFN_cuCtxPopCurrent_v4000 ctx_pop_current;
    PFN_cuCtxSynchronize_v2000 ctx_synchronize;
    PFN_cuMemGetAllocationGranularity_v10020 mem_get_allocation_granularity;
    PFN_cuMemAddressReserve_v10020 mem_address_reserve;
    PFN_cuMemAddressFree_v10020 mem_address_free;
    PFN_cuMemCreate_v10020 mem_create;
    PFN_cuMemRelease_v10020 mem_release;
    PFN_cuMemMap_v10020 mem_map;
    PFN_cuMemUnmap_v10020 mem_unmap;
    PFN_cuMemSetAccess_v10020 mem_set_access;
    PFN_cuMemExportToShareableHandle_v10020 mem_export;
    PFN_cuMemImportFromShareableHandle_v10020 mem_import;
    PFN_cuMemAlloc_v3020 mem_alloc;
    PFN_cuMemFree_v3020 mem_free;
    PFN_cuMemsetD8_v3020 memset_d8;
    PFN_cuIpcGetMemHandle_v4010 ipc_get_mem_handle;
    PFN_cuIpcOpenMemHandle_v11000 ipc_open_mem_handle;
    PFN_cuIpcCloseMemHandle_v4010 ipc_close_mem_handle;
    PFN_cuStreamWaitValue64_v11070 stream_wait_value;
    PFN_cuStreamWriteValue64_v11070 stream_write_value;
};

// Initialises the driver at the first call. std::runtime_error if there is none, it is too old, or it fails to start.
const Driver& driver();

// std::runtime_error with the driver's name of the error and `what` was tried.
void check_driver(CUresult status, const char* what);

// The device's primary context, which the runtime and torch use too, is current while this lives. Nothing changes for
// the caller's thread: the runtime's current device stays what it was.
class ContextScope {
  public:
    explicit ContextScope(CUcontext context);
    ~ContextScope();
    ContextScope(const ContextScope&) = delete;
    ContextScope& operator=(const ContextScope&) = delete;
};

}  // namespace deep_ep
