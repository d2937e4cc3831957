// Which experts a rank owns: contiguous ranges, the first E % R ranks own one more. The rule of deep_ep/layout.py.
#pragma once

#include "layout/host_device.h"
#include "layout/small_divider.h"

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

// The same for kernels whose every instruction counts.
struct ExpertMap {
    int num_experts, num_ranks;
    int base, extra;
    SmallDivider by_base, by_wide;

    DEEP_EP_HOST_DEVICE static ExpertMap of(int num_experts, int num_ranks) {
        const int base = num_experts / num_ranks;
        return {num_experts,
                num_ranks,
                base,
                num_experts % num_ranks,
                SmallDivider::of(base > 0 ? base : 1),
                SmallDivider::of(base + 1)};
    }
    DEEP_EP_HOST_DEVICE int owner(int expert) const {
        const int wide = extra * (base + 1);
        return expert < wide ? by_wide.quotient(expert) : extra + by_base.quotient(expert - wide);
    }
    DEEP_EP_HOST_DEVICE int first(int rank) const { return rank * base + (rank < extra ? rank : extra); }
    DEEP_EP_HOST_DEVICE int count(int rank) const { return base + (rank < extra ? 1 : 0); }
};

}  // namespace deep_ep
