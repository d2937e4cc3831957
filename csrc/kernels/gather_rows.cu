#include <algorithm>

#include "kernels/launch.h"
#include "layout/elements.cuh"
#include "runtime/errors.h"

namespace deep_ep {
namespace {

constexpr int kNumThreads = 256;
constexpr int64_t kMaxGrid = 0x7FFFFFFF;

// A block a row; the block's threads stride over its words of type Word.
template <class Word, class Index>
__global__ void __launch_bounds__(kNumThreads)
    dispatch_gather_rows(const __grid_constant__ GatherRowsArgs args) {
    const int64_t num_words = args.row_bytes / static_cast<int64_t>(sizeof(Word));
    for (int64_t row = blockIdx.x; row < args.num_rows; row += gridDim.x) {
        const int64_t source = static_cast<int64_t>(static_cast<const Index*>(args.index)[row]);
        const bool valid = source >= 0 && source < args.num_x_rows;
        const auto* from = reinterpret_cast<const Word*>(args.x + (valid ? source : 0) * args.x_stride);
        auto* to = reinterpret_cast<Word*>(args.out + row * args.out_stride);
        for (int64_t i = threadIdx.x; i < num_words; i += kNumThreads) to[i] = valid ? from[i] : Word{};
    }
}

template <class Word>
void launch(const GatherRowsArgs& args, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(std::min(args.num_rows, kMaxGrid));
    if (args.index_is_int64) {
        dispatch_gather_rows<Word, int64_t><<<blocks, kNumThreads, 0, stream>>>(args);
    } else {
        dispatch_gather_rows<Word, int32_t><<<blocks, kNumThreads, 0, stream>>>(args);
    }
    check_launch("dispatch_gather_rows");
}

}  // namespace

void launch_dispatch_gather_rows(const GatherRowsArgs& args, Stream stream) {
    if (args.num_rows == 0 || args.row_bytes == 0) return;
    // The widest word that divides every address and length; payload rows are multiples of 16 bytes.
    const uint64_t together = reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.out) |
                              static_cast<uint64_t>(args.x_stride) | static_cast<uint64_t>(args.out_stride) |
                              static_cast<uint64_t>(args.row_bytes);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (together % 16 == 0) return launch<uint4>(args, cuda_stream);
    if (together % 4 == 0) return launch<uint32_t>(args, cuda_stream);
    return launch<uint8_t>(args, cuda_stream);
}

}  // namespace deep_ep
