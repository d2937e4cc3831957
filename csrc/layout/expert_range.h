// Which experts a rank owns: contiguous ranges, the first E % R ranks own one more. The rule of deep_ep/layout.py.
#pragma once

#include "layout/host_device.h"

namespace deep_ep {

struct ExpertRange {
    int first;
    int count;
};

DEEP_EP_HOST_DEVICE ExpertRange expert_range(int num_experts, int num_ranks, int rank) {
    const int base = num_experts / num_ranks, extra = num_experts % num_ranks;
    return {rank * base + (rank < extra ? rank : extra), base + (rank < extra ? 1 : 0)};
}

DEEP_EP_HOST_DEVICE int rank_of_expert(int expert, int num_experts, int num_ranks) {
    const int base = num_experts / num_ranks, extra = num_experts % num_ranks;
    const int wide = extra * (base + 1);  // experts of the ranks that own one more
    return expert < wide ? expert / (base + 1) : extra + (expert - wide) / base;
}

}  // namespace deep_ep
