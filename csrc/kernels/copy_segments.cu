#include <algorithm>

#include "kernels/peer_launch.h"
#include "ptx/bulk_copy.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"

namespace deep_ep {
namespace {

constexpr int kNumWarps = 12;
constexpr int kNumStages = 4;
constexpr int kPieceBytes = 4096;
constexpr int kSharedBytes = kNumWarps * kNumStages * kPieceBytes;

// One thread of a warp keeps kNumStages bulk copies going; no data passes through registers.
__global__ void __launch_bounds__(kNumWarps * 32)
    dispatch_combine_copy(const __grid_constant__ CopySegmentsArgs args) {
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ uint64_t loaded[kNumWarps][kNumStages];
    if (threadIdx.x % 32 != 0) return;
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kNumWarps * kPieceBytes;
    const int64_t first = (static_cast<int64_t>(warp) * gridDim.x + blockIdx.x) * kPieceBytes;
    uint8_t* own = stages + warp * kNumStages * kPieceBytes;
    for (int stage = 0; stage < kNumStages; ++stage) ptx::mbarrier_init(&loaded[warp][stage], 1);
    ptx::fence_mbarrier_init();
    unsigned parities = 0;
    for (int i = 0; i < args.num_segments; ++i) {
        const CopySegmentsArgs::Segment& segment = args.segments[i];
        if (segment.from == nullptr) {
            for (int j = 0; j < kPieceBytes / 16; ++j)
                reinterpret_cast<uint4*>(own)[j] = {~0u, ~0u, ~0u, ~0u};
            ptx::fence_proxy_async_shared();
            for (int64_t at = first; at < segment.bytes; at += step) {
                ptx::bulk_store(segment.to + at, own,
                                min(segment.bytes - at, static_cast<int64_t>(kPieceBytes)));
            }
            ptx::bulk_commit();
            ptx::bulk_wait_all();
            continue;
        }
        auto bytes_at = [&](int64_t at) {
            return static_cast<uint32_t>(min(segment.bytes - at, static_cast<int64_t>(kPieceBytes)));
        };
        auto load = [&](int64_t at, int stage) {
            if (at >= segment.bytes) return;
            ptx::mbarrier_arrive_expect(&loaded[warp][stage], bytes_at(at));
            ptx::bulk_load(own + stage * kPieceBytes, segment.from + at, bytes_at(at), &loaded[warp][stage]);
        };
        for (int stage = 0; stage < kNumStages - 1; ++stage) load(first + stage * step, stage);
        int stage = 0;
        for (int64_t at = first; at < segment.bytes; at += step) {
            // The rank's own memory: these copies end without anybody else.
            while (!ptx::mbarrier_try_wait(&loaded[warp][stage], parities >> stage & 1)) {
            }
            parities ^= 1u << stage;
            ptx::bulk_store(segment.to + at, own + stage * kPieceBytes, bytes_at(at));
            ptx::bulk_commit();
            // The stage before this one is free once its store has read it.
            const int next = (stage + kNumStages - 1) % kNumStages;
            ptx::bulk_wait_read<1>();
            load(at + (kNumStages - 1) * step, next);
            stage = (stage + 1) % kNumStages;
        }
        // The next segment starts with stage 0 again.
        ptx::bulk_wait_all();
    }
}

}  // namespace

void prepare_dispatch_combine_copy() {
    allow_shared_memory(dispatch_combine_copy, kSharedBytes, "dispatch_combine_copy");
}

void launch_dispatch_combine_copy(const CopySegmentsArgs& args, int num_sms, Stream stream) {
    int64_t bytes = 0;
    for (int i = 0; i < args.num_segments; ++i) bytes = std::max(bytes, args.segments[i].bytes);
    if (bytes == 0) return;
    const int64_t wanted = (bytes + kPieceBytes - 1) / kPieceBytes;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(num_sms, wanted));
    dispatch_combine_copy<<<blocks, kNumWarps * 32, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(args);
    check_launch("dispatch_combine_copy");
}

}  // namespace deep_ep
