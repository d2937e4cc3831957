// The host's side of a domain: the record that kernels write, and the wait for it. Free of CUDA headers.
#pragma once

#include <cstdint>
#include <optional>
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

    enum class Outcome : int { kFailed = 0, kCounts = 1, kRefused = 2 };
    // Waits until the counts are there, or a failure is, or a peer gave the operation up. Past the kernels' own deadline
    // something is wrong beyond a late peer, and the wait gives up as after a failure.
    Outcome wait_counts() const;

    // Ends all waits of this rank's kernels, as a failure would. Kernels of other ranks go on.
    void give_up();

    // Forgets all operations, here and in the own control block. No kernel of any rank may run.
    void reset();

    // How long a wait on the device lasts before it is told of; in kernels launched from now on.
    double warn_after() const;
    void set_warn_after(double seconds);

    struct Late {
        int peer;
        uint32_t operation, phase;
        uint64_t expected, seen;
    };
    // A wait that lasts long and has not been returned before. By one thread at a time.
    std::optional<Late> take_late();

    // For tests, in kernels launched from now on: a seed other than 0 delays every signal and wait, and each bit of
    // `planted` breaks a contract (sync/planted.h).
    void set_debug(uint32_t delay_seed, uint32_t planted);

    void close() noexcept;

  private:
    Domain domain_{};
    HostRecord* host_ = nullptr;
    uint64_t taken_[kMaxPeers] = {};  // keys of the late waits returned last
};

}  // namespace deep_ep
