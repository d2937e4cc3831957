// The host's side of a region for low-latency operations. Free of CUDA headers.
#pragma once

#include <cstdint>
#include <vector>

#include "layout/low_latency_layout.h"
#include "runtime/peer_domain.h"

namespace deep_ep {

// What the regions of a buffer have in common, in own device memory.
struct LowLatencyShared {
    uint32_t* masked;         // [R]
    uint64_t* last_waits_ns;  // [kNumKinds, R]
    uint64_t mask_after_ns;
};

class LowLatencyPeers {
  public:
    // `peers` outlives this object. regions: by rank, where the region is mapped here.
    LowLatencyPeers(const PeerDomain& peers, const std::vector<uintptr_t>& regions,
                    const LowLatencyLayout& layout, const LowLatencyShared& shared);

    // As of now: what tests and the host change in the domain holds for the kernels launched next.
    LowLatencyDomain domain() const;
    const LowLatencyLayout& layout() const { return domain_.layout; }

    // Forgets all operations in the own region. Waits for the device. No kernel of any rank may use the region.
    void clear() const;

  private:
    const PeerDomain& peers_;
    LowLatencyDomain domain_{};
};

}  // namespace deep_ep
