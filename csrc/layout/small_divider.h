// Division by a number that does not change: a multiplication in place of some twenty instructions.
#pragma once

#include <cstdint>

#include "layout/host_device.h"

namespace deep_ep {

// Exact for 0 <= n with n * divisor < 2^32.
struct SmallDivider {
    int divisor;
    uint32_t reciprocal;  // 2^32 / divisor, rounded up; 0 for 1, where it has no room

    DEEP_EP_HOST_DEVICE static SmallDivider of(int divisor) {
        return {divisor, divisor == 1 ? 0u : 0xFFFFFFFFu / static_cast<uint32_t>(divisor) + 1};
    }
    DEEP_EP_HOST_DEVICE int quotient(int n) const {
        if (reciprocal == 0) return n;
        return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * reciprocal >> 32);
    }
    DEEP_EP_HOST_DEVICE int remainder(int n) const { return n - quotient(n) * divisor; }
};

}  // namespace deep_ep
