// Baseline of the target: SSE2 on x86-64, NEON on aarch64.
#include <cstring>

#include "cpu/row_loops.h"

#define DEEP_EP_VECTOR_BYTES 16
#define DEEP_EP_LOOPS_NAME "generic"
namespace deep_ep::cpu::generic {
#include "cpu/row_loops.inl"
}  // namespace deep_ep::cpu::generic
const deep_ep::cpu::RowLoops deep_ep::cpu::kGenericLoops = deep_ep::cpu::generic::kLoops;
