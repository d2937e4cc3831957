// Rows of a combine that copy engines bring to their tokens' homes, so that no SM has to. Free of CUDA headers.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/launch.h"
#include "layout/control_block.h"

namespace deep_ep {

class PushCopies {
  public:
    explicit PushCopies(const Domain& domain);
    ~PushCopies();
    PushCopies(const PushCopies&) = delete;
    PushCopies& operator=(const PushCopies&) = delete;

    // Whether streams of this device can wait for and write words of memory.
    static bool available();

    // Enqueues the copies of combine `number`, whose kernel has been launched: what the copies wait for, this rank's kernel and
    // those of the peers, must never be queued behind them. rows: this rank's, in receive order. recv_counts: rows from each
    // rank. inbox_at: for each rank, the address, as mapped here, where this rank's rows go.
    void push(uint64_t number, uintptr_t rows, int64_t row_bytes, const std::vector<int32_t>& recv_counts,
              const std::vector<uintptr_t>& inbox_at);

    // Lets copies go on whose peers never came: nothing may wait without end. After a failure, and before destruction.
    void release() noexcept;
    void close() noexcept;

  private:
    Domain domain_;
    static constexpr int kMaxMarks = 7 * kMaxPeers;
    void* stream_ = nullptr;        // of the copies
    void* mark_stream_ = nullptr;   // of the marks that tell how far the copies have come
    void* copied_[kMaxMarks] = {};  // events, made when first needed
};

}  // namespace deep_ep
