// What the launches of probes check of their arguments. A std::invalid_argument becomes ValueError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace deep_ep {

inline void check_range(int value, int low, int high, const char* what) {
    if (value >= low && value <= high) return;
    throw std::invalid_argument(std::string("deep_ep: probe: ") + what + " is " + std::to_string(value) +
                                ", expected " + std::to_string(low) + " to " + std::to_string(high));
}

inline void check_multiple(int64_t value, int64_t divisor, const char* what) {
    if (value >= 0 && value % divisor == 0) return;
    throw std::invalid_argument(std::string("deep_ep: probe: ") + what + " is " + std::to_string(value) +
                                ", expected a multiple of " + std::to_string(divisor));
}

}  // namespace deep_ep
