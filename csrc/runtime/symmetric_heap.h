// Memory that every rank of an NVLink domain maps: one address range a rank, filled by chunks that are appended at the
// same offset everywhere and never move. Free of CUDA headers: what bindings and other host code include.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace deep_ep {

// How a chunk travels to the other ranks' processes.
enum class HandleKind : int {
    kFileDescriptor = 0,  // cuMem memory as a POSIX file descriptor: one host
    kFabric = 1,          // cuMem memory as a fabric handle: hosts of one NVLink fabric
    kIpc = 2,             // one cuMemAlloc block as a CUDA IPC handle: cannot grow
};

// What the other ranks need to map a chunk.
struct ChunkHandle {
    int64_t bytes;     // real size, the same on every rank
    int fd;            // kFileDescriptor: owned by the caller, who closes it once it is sent; else -1
    std::string blob;  // the other kinds: the handle's bytes
};

struct HeapUsage {
    int64_t reserve_bytes;  // address range of a rank
    int64_t mapped_bytes;   // own device memory, control block included
    int64_t control_bytes;  // control block with its padding
    int64_t used_bytes;     // handed to torch, which may hold some of it for reuse
    int64_t free_bytes;     // not handed out
    int64_t largest_free_bytes;
    int64_t num_chunks;
    int64_t stand_in_bytes;  // addresses without memory that torch holds (see OwnMemory::allocate)
};

class OwnMemory;

// Chunks are made by all ranks together: each calls create_chunk with the same sizes, gives the handle to the others,
// imports theirs and commits; any rank that fails makes all discard. One thread at a time for these calls and destroy;
// offset_of, usage and the pool functions may run beside them. Errors of the driver are std::runtime_error.
class SymmetricHeap {
  public:
    // reserve_bytes 0: twice the device's memory. It bounds what the heap may ever map a rank.
    SymmetricHeap(int device, int rank, int num_ranks, HandleKind kind, int64_t reserve_bytes);
    // Frees nothing, so that an interpreter that ends waits for no kernel: destroy() does it, or the process's end.
    ~SymmetricHeap() = default;
    SymmetricHeap(const SymmetricHeap&) = delete;
    SymmetricHeap& operator=(const SymmetricHeap&) = delete;

    // Own memory for the next chunk. The first chunk starts with the control block: control_bytes, zeroed.
    ChunkHandle create_chunk(int64_t bytes, int64_t control_bytes);
    void import_chunk(int peer, int64_t bytes, int fd, const std::string& blob);  // does not close fd
    void commit_chunk();
    void discard_chunk();

    std::vector<uintptr_t> bases() const;        // by rank, as mapped here
    int64_t offset_of(uintptr_t address) const;  // in the own range, -1 elsewhere
    HeapUsage usage() const;
    int64_t granularity() const;  // chunks are multiples of it, in bytes

    // deep_ep_pool_malloc serves this heap until another one is activated, with memory of the pool, or, when that is
    // full, with stand-ins: addresses without memory. With stand_in_only it hands out those alone. The caller lets one
    // thread at a time activate and allocate.
    void activate(bool stand_in_only) const;
    static bool is_stand_in(uintptr_t address);

    // A block of the own pool for the caller's use, as an offset; -1 when no free block is large enough. It comes back
    // by return_block (std::invalid_argument for any other offset) or with the heap.
    int64_t reserve_block(int64_t bytes);
    void return_block(int64_t offset);

    // Waits for the device, unmaps the other ranks' memory, and frees the own one, or leaves that to the last tensor
    // in it. No kernel of another rank may use this rank's memory any more. Never throws; again: does nothing.
    void destroy() noexcept;

  private:
    const OwnMemory& own() const;
    void unmap_pending_peers() noexcept;

    std::shared_ptr<OwnMemory> own_;
    int rank_;
    HandleKind kind_;
    std::vector<uintptr_t> peers_;  // by rank: address of the range; the own one is in own_
    std::vector<bool> imported_;    // by rank: whether the chunk that is not committed yet is mapped
};

}  // namespace deep_ep
