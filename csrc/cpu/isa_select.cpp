#include <cstdlib>
#include <cstring>

#include "cpu/row_loops.h"

namespace deep_ep::cpu {
namespace {

const RowLoops& choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool has_avx2 = __builtin_cpu_supports("avx2");
    const char* wanted = std::getenv("DEEP_EP_CPU_ISA");
    // The variable can only take features away: code this processor lacks is never chosen.
    const bool any = wanted == nullptr;
    if (has_avx512 && (any || std::strcmp(wanted, "avx512") == 0)) return kAvx512Loops;
    if (has_avx2 && (any || std::strcmp(wanted, "generic") != 0)) return kAvx2Loops;
#endif
    return kGenericLoops;
}

}  // namespace

const RowLoops& row_loops() {
    static const RowLoops& chosen = choose();
    return chosen;
}

}  // namespace deep_ep::cpu
