#include "runtime/peer_domain.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <thread>

#include "runtime/errors.h"

namespace deep_ep {

constexpr double kWarnAfterSeconds = 10.0;

namespace {

// Of the current device.
int attribute(cudaDeviceAttr which, const char* what) {
    int device = 0, value = 0;
    check_cuda(cudaGetDevice(&device), "the current device");
    check_cuda(cudaDeviceGetAttribute(&value, which, device), what);
    return value;
}

// Measured on Hopper (csrc/README.md). Other GPUs are given all blocks that the budget allows.
int blocks_that_fill_the_links(int num_sms) {
    return attribute(cudaDevAttrComputeCapabilityMajor, "its capability") == 9 ? 14 : num_sms;
}

}  // namespace

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
    domain_.num_sms = attribute(cudaDevAttrMultiProcessorCount, "its SMs");
    domain_.fills_link = blocks_that_fill_the_links(domain_.num_sms);
    domain_.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
    set_warn_after(kWarnAfterSeconds);
}

PeerDomain::~PeerDomain() {
    close();
}

void PeerDomain::expect_counts() {
    host_->epoch = 0;
}

PeerDomain::Outcome PeerDomain::wait_counts() const {
    const auto limit = std::chrono::nanoseconds(2 * domain_.timeout_ns) + std::chrono::seconds(10);
    const auto start = std::chrono::steady_clock::now();
    for (uint64_t spin = 0; host_->epoch == 0; ++spin) {
        if (host_->error != 0) return Outcome::kFailed;
        if (spin % 1024 != 1023) continue;
        const auto waited = std::chrono::steady_clock::now() - start;
        if (waited > limit) return Outcome::kFailed;
        // Ranks that share cores must let each other go on.
        if (waited > std::chrono::milliseconds(1)) std::this_thread::yield();
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    return host_->epoch == kRefusedSignature ? Outcome::kRefused : Outcome::kCounts;
}

void PeerDomain::give_up() {
    // On a stream of its own: the others may be the ones that wait.
    cudaStream_t stream = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    auto* const control = reinterpret_cast<ControlBlock*>(domain_.base[domain_.rank]);
    const cudaError_t status = cudaMemsetAsync(&control->failed, 1, sizeof(control->failed), stream);
    const cudaError_t ended = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    check_cuda(status, "ending waits");
    check_cuda(ended, "ending waits");
}

void PeerDomain::reset() {
    check_cuda(cudaMemset(domain_.base[domain_.rank], 0, sizeof(ControlBlock)), "clearing the control block");
    check_cuda(cudaDeviceSynchronize(), "clearing the control block");
    std::memset(static_cast<void*>(host_), 0, sizeof(HostRecord));
    std::fill(std::begin(taken_), std::end(taken_), 0);
}

double PeerDomain::warn_after() const {
    return static_cast<double>(domain_.warn_ns) * 1e-9;
}

void PeerDomain::set_warn_after(double seconds) {
    domain_.warn_ns = static_cast<uint64_t>(seconds * 1e9);
}

std::optional<PeerDomain::Late> PeerDomain::take_late() {
    for (int peer = 0; host_ != nullptr && peer < domain_.num_ranks; ++peer) {
        const LateWait& late = host_->late[peer];
        const uint64_t key = late.key;
        if (key == taken_[peer]) continue;
        std::atomic_thread_fence(std::memory_order_acquire);
        taken_[peer] = key;
        return Late{peer, late.operation, late.phase, late.expected, late.seen};
    }
    return std::nullopt;
}

void PeerDomain::set_debug(uint32_t delay_seed, uint32_t planted) {
    domain_.delay_seed = delay_seed;
    domain_.planted = planted;
}

void PeerDomain::close() noexcept {
    if (host_ != nullptr) cudaFreeHost(host_);
    host_ = nullptr;
}

}  // namespace deep_ep
