#include "runtime/symmetric_heap.h"

#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>

#include "runtime/driver.h"
#include "runtime/pool.h"

namespace deep_ep {
namespace {

// Stand-ins (see allocate): addresses past any that a process can have, so that torch, which orders free blocks by size
// and then by address, prefers memory of the same size. 16 TiB a heap, never used again.
constexpr uintptr_t kStandInBase = uintptr_t{1} << 56;
constexpr int64_t kStandInBytes = int64_t{1} << 44;
constexpr uintptr_t kStandInEnd = uintptr_t{1} << 63;
std::atomic<uintptr_t> next_stand_in_base{kStandInBase};

constexpr int64_t kMinGranularity =
    2 * 1024 * 1024;  // smaller cuMemAlloc blocks may share an IPC handle's memory

CUmemAllocationHandleType handle_type(HandleKind kind) {
    return kind == HandleKind::kFabric ? CU_MEM_HANDLE_TYPE_FABRIC : CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
}

CUmemAllocationProp allocation_properties(int device, HandleKind kind) {
    CUmemAllocationProp properties;
    std::memset(&properties, 0,
                sizeof(properties));  // no compression, no GPUDirect RDMA: NVLink needs neither
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = handle_type(kind);
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device;
    return properties;
}

// Maps `handle` at `address` for kernels of `device`; leaves nothing mapped when it fails.
void map_for_device(CUdeviceptr address, int64_t bytes, CUmemGenericAllocationHandle handle, int device) {
    const Driver& d = driver();
    check_driver(d.mem_map(address, bytes, 0, handle, 0), "cuMemMap");
    CUmemAccessDesc access;
    std::memset(&access, 0, sizeof(access));
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = device;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    const CUresult status = d.mem_set_access(address, bytes, &access, 1);
    if (status != CUDA_SUCCESS) d.mem_unmap(address, bytes);
    check_driver(status, "cuMemSetAccess");
}

}  // namespace

// A rank's own part of the heap. Tensors may outlive the buffer that made them, so this lives until the heap is
// destroyed and the last block has come back.
class OwnMemory {
  public:
    OwnMemory(int device, HandleKind kind, int64_t reserve_bytes)
        : device_(device), kind_(kind), pid_(getpid()) {
        const Driver& d = driver();
        check_driver(d.device_get(&cu_device_, device), "cuDeviceGet");
        check_driver(d.primary_ctx_retain(&context_, cu_device_), "cuDevicePrimaryCtxRetain");
        try {
            ContextScope scope(context_);
            if (reserve_bytes <= 0) {
                size_t total = 0;
                check_driver(d.device_total_mem(&total, cu_device_), "cuDeviceTotalMem");
                reserve_bytes = 2 * static_cast<int64_t>(total);
            }
            if (kind_ != HandleKind::kIpc) {
                const CUmemAllocationProp properties = allocation_properties(device, kind_);
                size_t granularity = 0;
                check_driver(d.mem_get_allocation_granularity(&granularity, &properties,
                                                              CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                             "cuMemGetAllocationGranularity");
                granularity_ = round_up(kMinGranularity, static_cast<int64_t>(granularity));
            }
            reserve_bytes_ = round_up(reserve_bytes, granularity_);
            const uintptr_t start = next_stand_in_base.fetch_add(kStandInBytes);
            if (start < kStandInEnd) stand_ins_.add(0, kStandInBytes);
            stand_in_base_ = start;
            if (kind_ != HandleKind::kIpc) base_ = reserve();
        } catch (...) {
            d.primary_ctx_release(cu_device_);
            throw;
        }
    }

    // An address range as large as the own one.
    CUdeviceptr reserve() const {
        CUdeviceptr address = 0;
        check_driver(driver().mem_address_reserve(&address, reserve_bytes_, granularity_, 0, 0),
                     "cuMemAddressReserve");
        return address;
    }

    ChunkHandle create_chunk(int64_t bytes, int64_t control_bytes) {
        const int64_t control = round_up(control_bytes, kPoolAlignment);
        if (pending_bytes_ > 0)
            throw std::logic_error("deep_ep: the chunk before is neither committed nor discarded");
        if (bytes <= 0 || control_bytes < 0 || control > bytes || (mapped_bytes() > 0 && control > 0)) {
            throw std::invalid_argument(
                "deep_ep: a chunk of " + std::to_string(bytes) + " bytes with a control block of " +
                std::to_string(control_bytes) +
                ": expected a positive size, and a control block in the first chunk only");
        }
        if (kind_ == HandleKind::kIpc && mapped_bytes() > 0) {
            throw std::runtime_error(
                "deep_ep: peer memory through CUDA IPC has a fixed size and cannot grow");
        }
        if (bytes > reserve_bytes_ - mapped_bytes()) {
            throw std::runtime_error("deep_ep: a chunk of " + std::to_string(bytes) +
                                     " bytes does not fit: " + std::to_string(mapped_bytes()) + " of the " +
                                     std::to_string(reserve_bytes_) +
                                     " bytes of addresses reserved for a rank are taken");
        }
        bytes = round_up(bytes, granularity_);
        ContextScope scope(context_);
        ChunkHandle chunk = kind_ == HandleKind::kIpc ? create_ipc(bytes) : create_mapped(bytes);
        pending_bytes_ = bytes;
        pending_control_ = control;
        try {
            if (control > 0) {
                const Driver& d = driver();
                check_driver(d.memset_d8(base_, 0, control), "cuMemsetD8");
                check_driver(d.ctx_synchronize(),
                             "cuCtxSynchronize");  // zeros before any rank hears of the chunk
            }
        } catch (...) {
            if (chunk.fd >= 0) close(chunk.fd);
            discard_chunk();
            throw;
        }
        return chunk;
    }

    void commit_chunk() {
        if (pending_bytes_ == 0) throw std::logic_error("deep_ep: there is no chunk to commit");
        const int64_t offset = mapped_bytes();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            const int64_t pool_bytes = pending_bytes_ - pending_control_;
            if (pool_bytes > 0) pool_.add(offset + pending_control_, pool_bytes);
            control_bytes_ += pending_control_;
            chunks_.push_back(pending_bytes_);
        }
        release_pending_handle();
        mapped_bytes_.store(offset + pending_bytes_, std::memory_order_release);
        pending_bytes_ = 0;
    }

    void discard_chunk() noexcept {
        if (pending_bytes_ == 0) return;
        const Driver& d = driver();
        if (kind_ == HandleKind::kIpc) {
            d.mem_free(base_);
            base_ = 0;
        } else {
            d.mem_unmap(base_ + mapped_bytes(), pending_bytes_);
        }
        release_pending_handle();
        pending_bytes_ = 0;
    }

    int64_t offset_of(uintptr_t address) const {
        const int64_t mapped = mapped_bytes();
        if (mapped == 0 || address < base_ || address - base_ >= static_cast<uint64_t>(mapped)) return -1;
        return static_cast<int64_t>(address - base_);
    }

    // For torch's allocator, which must not get null: it would first give all its own cached memory back to the driver
    // (seconds, and a synchronised device), then raise. A full pool hands out a stand-in instead: a unique address
    // without memory, which the caller knows by is_stand_in and never uses.
    void* allocate(int64_t bytes, bool stand_in_only) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (retired_) return nullptr;
        const int64_t offset = stand_in_only ? -1 : pool_.allocate(bytes);
        if (offset >= 0) return reinterpret_cast<void*>(base_ + offset);
        const int64_t stand_in = stand_ins_.allocate(bytes);
        return stand_in < 0 ? nullptr : reinterpret_cast<void*>(stand_in_base_ + stand_in);
    }

    // True if the memory is retired and this was the last block: the caller then calls release().
    bool free(uintptr_t address) {
        std::lock_guard<std::mutex> lock(mutex_);
        const bool freed = address >= kStandInBase
                               ? stand_ins_.free(static_cast<int64_t>(address - stand_in_base_))
                               : pool_.free(static_cast<int64_t>(address - base_));
        return freed && retired_ && pool_.num_used() + stand_ins_.num_used() == 0;
    }

    // A block that torch does not know of; -1 when no free one is large enough.
    int64_t reserve_block(int64_t bytes) {
        std::lock_guard<std::mutex> lock(mutex_);
        const int64_t offset = pool_.allocate(bytes);
        if (offset >= 0) reserved_.insert(offset);
        return offset;
    }

    void return_block(int64_t offset) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (reserved_.erase(offset) == 0) {
            throw std::invalid_argument("deep_ep: no block was reserved at offset " + std::to_string(offset));
        }
        pool_.free(offset);
    }

    // Hands out nothing any more, and takes the reserved blocks back. True if no block is in use: the caller then calls
    // release().
    bool retire() {
        std::lock_guard<std::mutex> lock(mutex_);
        retired_ = true;
        for (const int64_t offset : reserved_) pool_.free(offset);
        reserved_.clear();
        return pool_.num_used() + stand_ins_.num_used() == 0;
    }

    HeapUsage usage() const {
        std::lock_guard<std::mutex> lock(mutex_);
        return {reserve_bytes_,
                mapped_bytes(),
                control_bytes_,
                pool_.bytes_used(),
                pool_.bytes_free(),
                pool_.largest_free(),
                static_cast<int64_t>(chunks_.size()),
                stand_ins_.bytes_used()};
    }

    // All committed chunks of a rank's range; they are of the same sizes on every rank.
    void unmap_chunks(CUdeviceptr address) const noexcept {
        for (const int64_t bytes : chunks_) {
            driver().mem_unmap(address, bytes);
            address += bytes;
        }
    }

    // Everything back to the driver, whose answers are ignored: it may be shutting down already.
    void release() noexcept {
        if (forked()) return;
        const Driver& d = driver();
        CUcontext popped = nullptr;
        if (d.ctx_push_current(context_) == CUDA_SUCCESS) {
            d.ctx_synchronize();  // streams of this process may still read what is unmapped
            if (kind_ == HandleKind::kIpc) {
                if (base_ != 0) d.mem_free(base_);
            } else {
                unmap_chunks(base_);
                d.mem_address_free(base_, reserve_bytes_);
            }
            d.ctx_pop_current(&popped);
        }
        d.primary_ctx_release(cu_device_);
    }

    // A child of a fork inherits the object but no CUDA: it must not touch the driver.
    bool forked() const { return getpid() != pid_; }

    int device() const { return device_; }
    CUcontext context() const { return context_; }
    uintptr_t base() const { return base_; }
    int64_t reserve_bytes() const { return reserve_bytes_; }
    int64_t granularity() const { return granularity_; }
    int64_t mapped_bytes() const { return mapped_bytes_.load(std::memory_order_acquire); }
    int64_t pending_bytes() const { return pending_bytes_; }
    uintptr_t stand_in_base() const { return stand_in_base_; }

  private:
    ChunkHandle create_mapped(int64_t bytes) {
        const Driver& d = driver();
        const CUmemAllocationProp properties = allocation_properties(device_, kind_);
        check_driver(d.mem_create(&pending_handle_, bytes, &properties, 0), "cuMemCreate");
        const CUdeviceptr address = base_ + mapped_bytes();
        bool mapped = false;
        try {
            map_for_device(address, bytes, pending_handle_, device_);
            mapped = true;
            if (kind_ == HandleKind::kFabric) {
                CUmemFabricHandle fabric;
                check_driver(d.mem_export(&fabric, pending_handle_, CU_MEM_HANDLE_TYPE_FABRIC, 0),
                             "cuMemExportToShareableHandle (fabric)");
                return {bytes, -1, std::string(reinterpret_cast<const char*>(&fabric), sizeof(fabric))};
            }
            int fd = -1;
            check_driver(d.mem_export(&fd, pending_handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                         "cuMemExportToShareableHandle (file descriptor)");
            fcntl(fd, F_SETFD, FD_CLOEXEC);
            return {bytes, fd, std::string()};
        } catch (...) {
            if (mapped) d.mem_unmap(address, bytes);
            release_pending_handle();
            throw;
        }
    }

    ChunkHandle create_ipc(int64_t bytes) {
        const Driver& d = driver();
        CUdeviceptr address = 0;
        check_driver(d.mem_alloc(&address, bytes), "cuMemAlloc");
        CUipcMemHandle handle;
        const CUresult status = d.ipc_get_mem_handle(&handle, address);
        if (status != CUDA_SUCCESS) d.mem_free(address);
        check_driver(status, "cuIpcGetMemHandle");
        base_ = address;
        return {bytes, -1, std::string(reinterpret_cast<const char*>(&handle), sizeof(handle))};
    }

    // The mapping keeps the memory; the handle is needed until the other ranks have theirs.
    void release_pending_handle() noexcept {
        if (pending_handle_ != 0) driver().mem_release(pending_handle_);
        pending_handle_ = 0;
    }

    const int device_;
    const HandleKind kind_;
    const pid_t pid_;
    CUdevice cu_device_ = 0;
    CUcontext context_ = nullptr;
    int64_t granularity_ = kMinGranularity;
    int64_t reserve_bytes_ = 0;
    CUdeviceptr base_ = 0;
    std::atomic<int64_t> mapped_bytes_{0};
    uintptr_t stand_in_base_ = 0;

    CUmemGenericAllocationHandle pending_handle_ = 0;
    int64_t pending_bytes_ = 0, pending_control_ = 0;

    mutable std::mutex mutex_;  // guards all below
    BlockAllocator pool_, stand_ins_;
    std::set<int64_t> reserved_;  // offsets of the blocks in use that are not torch's
    std::vector<int64_t> chunks_;
    int64_t control_bytes_ = 0;
    bool retired_ = false;
};

namespace {

// Own memory by address, for torch's frees, which name no heap. Never destroyed: torch may free at any time.
struct Registry {
    struct Range {
        uintptr_t end;
        std::shared_ptr<OwnMemory> memory;
    };
    std::mutex mutex;
    std::map<uintptr_t, Range> ranges;  // by first address

    std::shared_ptr<OwnMemory> find(uintptr_t address) {
        std::lock_guard<std::mutex> lock(mutex);
        auto next = ranges.upper_bound(address);
        if (next == ranges.begin()) return nullptr;
        const Range& range = std::prev(next)->second;
        return address < range.end ? range.memory : nullptr;
    }
    void add(uintptr_t begin, int64_t bytes, const std::shared_ptr<OwnMemory>& memory) {
        std::lock_guard<std::mutex> lock(mutex);
        ranges[begin] = {begin + static_cast<uintptr_t>(bytes), memory};
    }
    void remove(const OwnMemory* memory) {
        std::lock_guard<std::mutex> lock(mutex);
        for (auto it = ranges.begin(); it != ranges.end();) {
            it = it->second.memory.get() == memory ? ranges.erase(it) : std::next(it);
        }
    }
};

Registry& registry() {
    static Registry* const instance = new Registry;
    return *instance;
}

// The heap that torch's next request is for. The process makes one such request at a time (deep_ep/engines/pool.py).
std::atomic<const std::shared_ptr<OwnMemory>*> active_memory{nullptr};
std::atomic<bool> active_stand_in_only{false};

}  // namespace

SymmetricHeap::SymmetricHeap(int device, int rank, int num_ranks, HandleKind kind, int64_t reserve_bytes)
    : own_(std::make_shared<OwnMemory>(device, kind, reserve_bytes)),
      rank_(rank),
      kind_(kind),
      peers_(std::max(num_ranks, 0), 0),
      imported_(peers_.size(), false) {
    try {
        if (rank < 0 || rank >= num_ranks)
            throw std::invalid_argument("deep_ep: rank is not below num_ranks");
        if (kind == HandleKind::kIpc) return;
        ContextScope scope(own_->context());
        for (int peer = 0; peer < num_ranks; ++peer) {
            if (peer != rank) peers_[peer] = own_->reserve();
        }
    } catch (...) {
        destroy();
        throw;
    }
}

const OwnMemory& SymmetricHeap::own() const {
    if (own_ == nullptr) throw std::runtime_error("deep_ep: this symmetric heap was destroyed");
    return *own_;
}

ChunkHandle SymmetricHeap::create_chunk(int64_t bytes, int64_t control_bytes) {
    own();
    return own_->create_chunk(bytes, control_bytes);
}

void SymmetricHeap::import_chunk(int peer, int64_t bytes, int fd, const std::string& blob) {
    const OwnMemory& memory = own();
    const bool known = peer >= 0 && peer < static_cast<int>(peers_.size()) && peer != rank_;
    if (!known || bytes != memory.pending_bytes() || bytes == 0 || imported_[peer]) {
        throw std::invalid_argument("deep_ep: a chunk of " + std::to_string(bytes) + " bytes of rank " +
                                    std::to_string(peer) + " does not match the own one of " +
                                    std::to_string(memory.pending_bytes()) + " bytes");
    }
    const Driver& d = driver();
    ContextScope scope(memory.context());
    if (kind_ == HandleKind::kIpc) {
        CUipcMemHandle handle;
        if (blob.size() != sizeof(handle)) throw std::invalid_argument("deep_ep: not a CUDA IPC handle");
        std::memcpy(&handle, blob.data(), sizeof(handle));
        CUdeviceptr address = 0;
        check_driver(d.ipc_open_mem_handle(&address, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS),
                     "cuIpcOpenMemHandle");
        peers_[peer] = address;
    } else {
        CUmemFabricHandle fabric;
        void* source = reinterpret_cast<void*>(static_cast<uintptr_t>(fd));
        if (kind_ == HandleKind::kFabric) {
            if (blob.size() != sizeof(fabric)) throw std::invalid_argument("deep_ep: not a fabric handle");
            std::memcpy(&fabric, blob.data(), sizeof(fabric));
            source = &fabric;
        }
        CUmemGenericAllocationHandle handle = 0;
        check_driver(d.mem_import(&handle, source, handle_type(kind_)), "cuMemImportFromShareableHandle");
        try {
            map_for_device(peers_[peer] + memory.mapped_bytes(), bytes, handle, memory.device());
        } catch (...) {
            d.mem_release(handle);
            throw;
        }
        d.mem_release(handle);  // the mapping keeps the memory
    }
    imported_[peer] = true;
}

void SymmetricHeap::commit_chunk() {
    own();
    for (size_t peer = 0; peer < peers_.size(); ++peer) {
        if (static_cast<int>(peer) != rank_ && !imported_[peer]) {
            throw std::logic_error("deep_ep: the chunk of rank " + std::to_string(peer) +
                                   " was not imported");
        }
    }
    const bool first = own_->mapped_bytes() == 0;
    const int64_t bytes = own_->pending_bytes();
    if (first) {
        registry().add(own_->base(), kind_ == HandleKind::kIpc ? bytes : own_->reserve_bytes(), own_);
        registry().add(own_->stand_in_base(), kStandInBytes, own_);
    }
    own_->commit_chunk();
    imported_.assign(imported_.size(), false);
}

void SymmetricHeap::discard_chunk() {
    own();
    ContextScope scope(own_->context());
    unmap_pending_peers();
    own_->discard_chunk();
}

void SymmetricHeap::unmap_pending_peers() noexcept {
    const Driver& d = driver();
    for (size_t peer = 0; peer < peers_.size(); ++peer) {
        if (!imported_[peer]) continue;
        if (kind_ == HandleKind::kIpc) {
            d.ipc_close_mem_handle(peers_[peer]);
            peers_[peer] = 0;
        } else {
            d.mem_unmap(peers_[peer] + own_->mapped_bytes(), own_->pending_bytes());
        }
        imported_[peer] = false;
    }
}

std::vector<uintptr_t> SymmetricHeap::bases() const {
    std::vector<uintptr_t> result = peers_;
    result[rank_] = own().base();
    return result;
}

int64_t SymmetricHeap::offset_of(uintptr_t address) const {
    return own().offset_of(address);
}

HeapUsage SymmetricHeap::usage() const {
    return own().usage();
}

int64_t SymmetricHeap::granularity() const {
    return own().granularity();
}

bool SymmetricHeap::is_stand_in(uintptr_t address) {
    return address >= kStandInBase && address < kStandInEnd;
}

void SymmetricHeap::activate(bool stand_in_only) const {
    own();
    active_memory.store(&own_, std::memory_order_release);
    active_stand_in_only.store(stand_in_only, std::memory_order_release);
}

int64_t SymmetricHeap::reserve_block(int64_t bytes) {
    own();
    return own_->reserve_block(bytes);
}

void SymmetricHeap::return_block(int64_t offset) {
    own();
    own_->return_block(offset);
}

void SymmetricHeap::destroy() noexcept {
    if (own_ == nullptr) return;
    const std::shared_ptr<OwnMemory>* active = &own_;
    active_memory.compare_exchange_strong(active, nullptr);
    const std::shared_ptr<OwnMemory> memory = own_;
    if (!memory->forked()) {
        const Driver& d = driver();
        CUcontext popped = nullptr;
        if (d.ctx_push_current(memory->context()) == CUDA_SUCCESS) {
            d.ctx_synchronize();
            unmap_pending_peers();
            memory->discard_chunk();
            for (size_t peer = 0; peer < peers_.size(); ++peer) {
                if (peers_[peer] == 0) continue;
                if (kind_ == HandleKind::kIpc) {
                    d.ipc_close_mem_handle(peers_[peer]);
                } else {
                    memory->unmap_chunks(peers_[peer]);
                    d.mem_address_free(peers_[peer], memory->reserve_bytes());
                }
            }
            d.ctx_pop_current(&popped);
        }
    }
    own_ = nullptr;
    if (memory->retire()) {
        registry().remove(memory.get());
        memory->release();
    }
}

}  // namespace deep_ep

// For torch.cuda.memory.CUDAPluggableAllocator, which looks them up by name.
extern "C" __attribute__((visibility("default"))) void* deep_ep_pool_malloc(ssize_t size, int, cudaStream_t) {
    try {
        const auto* memory = deep_ep::active_memory.load(std::memory_order_acquire);
        if (memory == nullptr) return nullptr;
        return (*memory)->allocate(size, deep_ep::active_stand_in_only.load(std::memory_order_acquire));
    } catch (...) {  // out of host memory; no exception may cross into the caller's C++ library
        return nullptr;
    }
}

extern "C" __attribute__((visibility("default"))) void deep_ep_pool_free(void* block, ssize_t, int,
                                                                         cudaStream_t) {
    try {
        const auto address = reinterpret_cast<uintptr_t>(block);
        const auto memory = deep_ep::registry().find(address);
        if (memory == nullptr || !memory->free(address)) return;
        deep_ep::registry().remove(memory.get());
        memory->release();
    } catch (...) {
    }
}
