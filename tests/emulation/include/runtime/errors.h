// csrc/runtime/errors.h on the CPU, where no CUDA call can fail.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace deep_ep {

inline void check_limit(int64_t value, int64_t limit, const char* kernel, const char* what) {
    if (value < 0 || value > limit) throw std::invalid_argument(std::string(kernel) + ": " + what);
}

}  // namespace deep_ep
