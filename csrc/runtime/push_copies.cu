#include "runtime/push_copies.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "runtime/driver.h"
#include "runtime/errors.h"

namespace deep_ep {
namespace {

// The home sums a chunk while the next ones travel. The first are short, since the home waits for them, and so is the last,
// since it sums that when all have come. Each costs about 2.5 us between two copies, so there are few.
constexpr int64_t kMinChunkBytes = 3 << 20;
constexpr int kParts = 16;  // of all rows
constexpr int kNumPlans = 4;
constexpr int kMaxChunks = 7;
constexpr int kNumChunks[kNumPlans] = {1, 2, 4, 7};
constexpr int kEnds[kNumPlans][kMaxChunks] = {{16}, {8, 16}, {2, 6, 12, 16}, {1, 2, 4, 7, 11, 14, 16}};

CUdeviceptr address_of(const volatile uint64_t* word) {
    return reinterpret_cast<CUdeviceptr>(word);
}

void* make_stream() {
    cudaStream_t stream = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    return stream;
}

void* make_event() {
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    return event;
}

ControlBlock* control(const Domain& domain, int rank) {
    return reinterpret_cast<ControlBlock*>(domain.base[rank]);
}

}  // namespace

PushCopies::PushCopies(const Domain& domain) : domain_(domain) {
    stream_ = make_stream();
    mark_stream_ = make_stream();
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

void PushCopies::push(uint64_t number, uintptr_t rows, int64_t row_bytes,
                      const std::vector<int32_t>& recv_counts, const std::vector<uintptr_t>& inbox_at) {
    auto* const stream = static_cast<cudaStream_t>(stream_);
    auto* const marks = static_cast<cudaStream_t>(mark_stream_);
    const Driver& api = driver();
    const int num_ranks = domain_.num_ranks, rank = domain_.rank;
    struct Block {
        int home;
        int64_t first, count;
        int plan;
    };
    std::vector<Block> blocks;
    int64_t first_row = 0;
    for (int home = 0; home < num_ranks; ++home) {
        const int64_t count = recv_counts[home];
        if (home != rank && count > 0) {
            int plan = num_ranks == 2 ? 3 : num_ranks <= 4 ? 2 : 1;
            while (plan > 0 && count * row_bytes < kNumChunks[plan] * kMinChunkBytes) --plan;
            blocks.push_back({home, first_row, count, plan});
        }
        first_row += count;
    }
    // Each rank starts with the one after it, so that not all write to the same.
    std::sort(blocks.begin(), blocks.end(), [&](const Block& a, const Block& b) {
        return (a.home - rank + num_ranks) % num_ranks < (b.home - rank + num_ranks) % num_ranks;
    });
    if (blocks.empty()) return;
    auto wait_for = [&](int home) {
        check_driver(api.stream_wait_value(stream, address_of(&control(domain_, rank)->inbox_open[home]),
                                           number, CU_STREAM_WAIT_VALUE_GEQ),
                     "waiting for an inbox");
    };
    wait_for(rank);  // this rank's own kernel has begun, so the rows are computed
    for (const Block& block : blocks) wait_for(block.home);
    int num_marks = 0;
    for (int chunk = 0; chunk < kMaxChunks; ++chunk) {
        for (const Block& block : blocks) {
            if (chunk >= kNumChunks[block.plan]) continue;
            const int64_t begin = chunk == 0 ? 0 : block.count * kEnds[block.plan][chunk - 1] / kParts;
            const int64_t end = block.count * kEnds[block.plan][chunk] / kParts;
            const auto* from = reinterpret_cast<const uint8_t*>(rows) + (block.first + begin) * row_bytes;
            auto* to = reinterpret_cast<uint8_t*>(inbox_at[block.home]) + begin * row_bytes;
            check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>((end - begin) * row_bytes),
                                       cudaMemcpyDeviceToDevice, stream),
                       "copying rows to a peer");
            // Written on a stream of their own, marks do not hold up the next copy. Order: a mark comes after its copy and
            // the marks before it, and is fenced (the flag that drops the fence is not given).
            void*& copied = copied_[num_marks++];
            if (copied == nullptr) copied = make_event();
            check_cuda(cudaEventRecord(static_cast<cudaEvent_t>(copied), stream), "recording an event");
            check_cuda(cudaStreamWaitEvent(marks, static_cast<cudaEvent_t>(copied), 0), "ordering streams");
            check_driver(
                api.stream_write_value(marks, address_of(&control(domain_, block.home)->pushed[rank]),
                                       number << 32 | static_cast<uint64_t>(block.first + end),
                                       CU_STREAM_WRITE_VALUE_DEFAULT),
                "marking rows that were copied");
        }
    }
}

void PushCopies::release() noexcept {
    if (stream_ == nullptr) return;
    cudaStream_t aside = nullptr;
    if (cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking) != cudaSuccess) return;
    for (int peer = 0; peer < domain_.num_ranks; ++peer) {
        driver().stream_write_value(aside, address_of(&control(domain_, domain_.rank)->inbox_open[peer]),
                                    kInboxReleased, CU_STREAM_WRITE_VALUE_DEFAULT);
    }
    cudaStreamSynchronize(aside);
    cudaStreamDestroy(aside);
}

void PushCopies::close() noexcept {
    if (stream_ == nullptr) return;
    cudaStreamDestroy(static_cast<cudaStream_t>(stream_));
    cudaStreamDestroy(static_cast<cudaStream_t>(mark_stream_));
    for (void*& event : copied_) {
        if (event != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(event));
        event = nullptr;
    }
    stream_ = mark_stream_ = nullptr;
}

}  // namespace deep_ep
