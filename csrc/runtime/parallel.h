// Splits a loop over threads of a small pool that lives as long as the process.
#pragma once

#include <cstdint>
#include <type_traits>

namespace deep_ep {

// Threads a call may use, its own included. Starts as OMP_NUM_THREADS, or else the cores this process may run on.
int num_threads();
void set_num_threads(int count);

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);
void parallel_ranges(int64_t num_items, int64_t bytes_per_item, RangeFunction function, void* context);

// Calls body(begin, end) over disjoint ranges that cover [0, num_items). `bytes_per_item` is the traffic of one item:
// a job below a few hundred KB runs inline, since waking a thread costs more than the copy. `body` must not throw.
template <class Body>
void parallel_for(int64_t num_items, int64_t bytes_per_item, Body&& body) {
    auto call = [](void* context, int64_t begin, int64_t end) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
    };
    parallel_ranges(num_items, bytes_per_item, call, &body);
}

}  // namespace deep_ep
