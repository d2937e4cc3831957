#include "runtime/peer_domain.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "runtime/errors.h"

namespace deep_ep {

PeerDomain::PeerDomain(const std::vector<uintptr_t>& bases, int rank, double timeout_s) {
    check_limit(static_cast<int64_t>(bases.size()), kMaxPeers, "PeerDomain", "the number of ranks");
    void* host = nullptr;
    check_cuda(cudaHostAlloc(&host, sizeof(HostRecord), cudaHostAllocMapped), "allocating the host record");
    std::memset(host, 0, sizeof(HostRecord));
    host_ = static_cast<HostRecord*>(host);
    void* device = nullptr;
    check_cuda(cudaHostGetDevicePointer(&device, host, 0), "mapping the host record");
    for (size_t r = 0; r < bases.size(); ++r) domain_.base[r] = reinterpret_cast<uint8_t*>(bases[r]);
    domain_.num_ranks = static_cast<int>(bases.size());
    domain_.rank = rank;
    domain_.host = static_cast<HostRecord*>(device);
    domain_.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
}

PeerDomain::~PeerDomain() {
    close();
}

void PeerDomain::expect_counts() {
    host_->epoch = 0;
}

bool PeerDomain::wait_counts() const {
    const auto limit = std::chrono::nanoseconds(2 * domain_.timeout_ns) + std::chrono::seconds(10);
    const auto start = std::chrono::steady_clock::now();
    for (uint64_t spin = 0; host_->epoch == 0; ++spin) {
        if (host_->error != 0) return false;
        if (spin % 1024 != 1023) continue;
        const auto waited = std::chrono::steady_clock::now() - start;
        if (waited > limit) throw std::runtime_error("deep_ep: the kernels that exchange counts never ran");
        // Ranks that share cores must let each other go on.
        if (waited > std::chrono::milliseconds(1)) std::this_thread::yield();
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    return true;
}

void PeerDomain::close() noexcept {
    if (host_ != nullptr) cudaFreeHost(host_);
    host_ = nullptr;
}

}  // namespace deep_ep
