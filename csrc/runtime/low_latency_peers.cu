#include "runtime/low_latency_peers.h"

#include <cuda_runtime_api.h>

#include "runtime/errors.h"

namespace deep_ep {

LowLatencyPeers::LowLatencyPeers(const PeerDomain& peers, const std::vector<uintptr_t>& regions,
                                 const LowLatencyLayout& layout, const LowLatencyShared& shared)
    : peers_(peers) {
    check_limit(static_cast<int64_t>(regions.size()), layout.num_ranks, "LowLatencyPeers",
                "the number of regions");
    for (size_t r = 0; r < regions.size(); ++r) domain_.region[r] = reinterpret_cast<uint8_t*>(regions[r]);
    domain_.layout = layout;
    domain_.masked = shared.masked;
    domain_.last_waits_ns = shared.last_waits_ns;
    domain_.mask_after_ns = shared.mask_after_ns;
}

LowLatencyDomain LowLatencyPeers::domain() const {
    LowLatencyDomain current = domain_;
    current.domain = peers_.domain();
    return current;
}

void LowLatencyPeers::clear() const {
    const char* what = "clearing the low-latency region";
    check_cuda(cudaMemset(domain_.region[peers_.domain().rank], 0, domain_.layout.state_bytes()), what);
    check_cuda(cudaDeviceSynchronize(), what);
}

}  // namespace deep_ep
