// The host's side of a domain: the record that kernels write, and the wait for it. Free of CUDA headers.
#pragma once

#include <cstdint>
#include <vector>

#include "layout/control_block.h"

namespace deep_ep {

class PeerDomain {
  public:
    PeerDomain(const std::vector<uintptr_t>& bases, int rank, double timeout_s);
    ~PeerDomain();
    PeerDomain(const PeerDomain&) = delete;
    PeerDomain& operator=(const PeerDomain&) = delete;

    const Domain& domain() const { return domain_; }
    HostRecord& host() { return *host_; }

    // Before the kernels whose counts are waited for next are launched.
    void expect_counts();

    // Waits until the counts are there (true), or a failure is (false). Past the kernels' own deadline something is
    // wrong beyond a late peer, and the wait gives up with an exception.
    bool wait_counts() const;

    void close() noexcept;

  private:
    Domain domain_{};
    HostRecord* host_ = nullptr;
};

}  // namespace deep_ep
