#include "kernels/peer_launch.h"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"
#include "sync/exchange.cuh"

namespace deep_ep {
namespace {

// A whole operation, so that the ranks stay in step: whoever reads the announcement moves nothing and ends it too.
__global__ void __launch_bounds__(kMaxPeers) dispatch_refuse(const __grid_constant__ Domain domain) {
    const uint64_t epoch = sync::own_control(domain)->epoch + 1;
    const int peer = static_cast<int>(threadIdx.x);
    if (peer < domain.num_ranks) {
        sync::open_announcement(domain, peer, epoch)->signature = kRefusedSignature;
        sync::publish(domain, peer, epoch);
    }
    sync::finish(domain, epoch, Operation::kDispatch);
}

}  // namespace

void prepare_dispatch_refuse() {
    load_kernel(dispatch_refuse, "dispatch_refuse");
}

void launch_dispatch_refuse(const Domain& domain, Stream stream) {
    dispatch_refuse<<<1, kMaxPeers, 0, static_cast<cudaStream_t>(stream)>>>(domain);
    check_launch("dispatch_refuse");
}

}  // namespace deep_ep
