#include "runtime/push_copies.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "runtime/driver.h"
#include "runtime/errors.h"

namespace deep_ep {
namespace {

// The home sums a chunk while the next one travels, so the last one should be short; each costs a copy's start, about 3 us.
constexpr int kMaxChunks = 8;
constexpr int64_t kMinChunkBytes = 2 << 20;

CUdeviceptr address_of(const volatile uint64_t* word) {
    return reinterpret_cast<CUdeviceptr>(word);
}

ControlBlock* control(const Domain& domain, int rank) {
    return reinterpret_cast<ControlBlock*>(domain.base[rank]);
}

}  // namespace

PushCopies::PushCopies(const Domain& domain) : domain_(domain) {
    cudaStream_t stream = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    stream_ = stream;
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    rows_ready_ = event;
}

PushCopies::~PushCopies() {
    close();
}

bool PushCopies::available() {
    // With blocking launches a copy would be enqueued only after the kernel that waits for the peers' copies has ended.
    const char* blocking = std::getenv("CUDA_LAUNCH_BLOCKING");
    if (blocking != nullptr && *blocking != '\0' && std::strcmp(blocking, "0") != 0) return false;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    int can = 0;
    const CUresult status = driver().device_get_attribute(
        &can, CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS, static_cast<CUdevice>(device));
    return status == CUDA_SUCCESS && can != 0;
}

void PushCopies::mark_ready(Stream stream) {
    check_cuda(cudaEventRecord(static_cast<cudaEvent_t>(rows_ready_), static_cast<cudaStream_t>(stream)),
               "recording an event");
}

void PushCopies::push(uint64_t number, uintptr_t rows, int64_t row_bytes,
                      const std::vector<int32_t>& recv_counts, const std::vector<uintptr_t>& inbox_at) {
    auto* const stream = static_cast<cudaStream_t>(stream_);
    const Driver& api = driver();
    check_cuda(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(rows_ready_), 0), "ordering streams");
    const int num_ranks = domain_.num_ranks, rank = domain_.rank;
    struct Block {
        int home;
        int64_t first, count, done, chunk;
    };
    std::vector<Block> blocks;
    int64_t first_row = 0;
    for (int home = 0; home < num_ranks; ++home) {
        const int64_t count = recv_counts[home];
        if (home != rank && count > 0) {
            const int64_t pieces = std::clamp<int64_t>(count * row_bytes / kMinChunkBytes, 1,
                                                       std::max(kMaxChunks / (num_ranks - 1), 2));
            blocks.push_back({home, first_row, count, 0, (count + pieces - 1) / pieces});
        }
        first_row += count;
    }
    // Each rank starts with the one after it, so that not all write to the same.
    std::sort(blocks.begin(), blocks.end(), [&](const Block& a, const Block& b) {
        return (a.home - rank + num_ranks) % num_ranks < (b.home - rank + num_ranks) % num_ranks;
    });
    for (const Block& block : blocks) {
        check_driver(
            api.stream_wait_value(stream, address_of(&control(domain_, rank)->inbox_open[block.home]), number,
                                  CU_STREAM_WAIT_VALUE_GEQ),
            "waiting for an inbox");
    }
    for (bool any = true; any;) {
        any = false;
        for (Block& block : blocks) {
            const int64_t count = std::min(block.chunk, block.count - block.done);
            if (count <= 0) continue;
            any = true;
            const auto* from =
                reinterpret_cast<const uint8_t*>(rows) + (block.first + block.done) * row_bytes;
            auto* to = reinterpret_cast<uint8_t*>(inbox_at[block.home]) + block.done * row_bytes;
            check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>(count * row_bytes),
                                       cudaMemcpyDeviceToDevice, stream),
                       "copying rows to a peer");
            block.done += count;
            // Order: the write of the mark comes after the copy's, and is fenced (no CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER).
            const auto end = static_cast<uint64_t>(block.first + block.done);
            check_driver(
                api.stream_write_value(stream, address_of(&control(domain_, block.home)->pushed[rank]),
                                       number << 32 | end, CU_STREAM_WRITE_VALUE_DEFAULT),
                "marking rows that were copied");
        }
    }
}

void PushCopies::release() noexcept {
    if (stream_ == nullptr) return;
    cudaStream_t aside = nullptr;
    if (cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking) != cudaSuccess) return;
    for (int peer = 0; peer < domain_.num_ranks; ++peer) {
        // Above any number; the comparison is that of a signed difference.
        driver().stream_write_value(aside, address_of(&control(domain_, domain_.rank)->inbox_open[peer]),
                                    uint64_t{1} << 62, CU_STREAM_WRITE_VALUE_DEFAULT);
    }
    cudaStreamSynchronize(aside);
    cudaStreamDestroy(aside);
}

void PushCopies::close() noexcept {
    if (stream_ == nullptr) return;
    cudaStreamDestroy(static_cast<cudaStream_t>(stream_));
    cudaEventDestroy(static_cast<cudaEvent_t>(rows_ready_));
    stream_ = rows_ready_ = nullptr;
}

}  // namespace deep_ep
