#include <algorithm>

#include "kernels/row_destinations.cuh"
#include "layout/elements.cuh"
#include "layout/piece_walk.h"
#include "ptx/bulk_copy.cuh"
#include "ptx/grid.cuh"
#include "runtime/errors.h"
#include "runtime/kernel_attributes.h"
#include "sync/exchange.cuh"

namespace deep_ep {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kNumStages = 2;
constexpr int kPerLane = 8;                    // columns of a lane: 16 lanes hold a tile
constexpr int kPerStep = 32 * kPerLane;        // columns of a warp at a time: two tiles
constexpr int kGroup = kTile * kTilesPerWord;  // pieces end between packed words
constexpr int kMaxStageBytes = 8192;
constexpr int kSharedBytes = 216 * 1024;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// What a warp owns of shared memory: rows as they are, rows quantised, and the scales of a piece.
struct WarpMemory {
    int columns;  // of a piece
    int in_bytes;

    __host__ __device__ int out_at(int stage) const { return kNumStages * in_bytes + stage * columns; }
    __host__ __device__ int scales_at(int stage) const {
        return kNumStages * (in_bytes + columns) + stage * scale_bytes();
    }
    __host__ __device__ int scale_bytes() const { return (columns / kTile * 4 + 15) / 16 * 16; }
    __host__ __device__ int bytes() const {
        return (kNumStages * (in_bytes + columns + scale_bytes()) + 127) / 128 * 128;
    }
};

template <class Type>
__device__ __forceinline__ void load_values(const uint8_t* piece, int column, float (&values)[kPerLane]) {
    using Storage = typename Type::Storage;
    constexpr int kPerVector = 16 / sizeof(Storage);
    const auto* vectors =
        reinterpret_cast<const Pack<Storage, kPerVector>*>(piece + column * sizeof(Storage));
#pragma unroll
    for (int v = 0; v < kPerLane / kPerVector; ++v) {
        float part[kPerVector];
        widen_vector<Type, kPerVector>(vectors[v], part);
#pragma unroll
        for (int i = 0; i < kPerVector; ++i) values[v * kPerVector + i] = part[i];
    }
}

// Eight codes of E4M3 with the bits of to_e4m3. NaN is rare and looked for once: the sum of values is NaN if one is.
__device__ __forceinline__ uint2 quantize_lane(const float (&values)[kPerLane], float inverse) {
    float v[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) v[i] = __fmul_rn(values[i], inverse);
    const float probe = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    Pack<uint16_t, kPerLane / 2> codes;
    if (is_nan(probe)) {
#pragma unroll
        for (int i = 0; i < kPerLane; i += 2) {
            codes.v[i / 2] = static_cast<uint16_t>(to_e4m3(v[i]) | to_e4m3(v[i + 1]) << 8);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kPerLane; i += 2) {
            codes.v[i / 2] = __nv_cvt_float2_to_fp8x2(make_float2(v[i], v[i + 1]), __NV_SATFINITE, __NV_E4M3);
        }
    }
    return *reinterpret_cast<const uint2*>(&codes);
}

// One piece of a row from `in` to `out` and `scales`, by a warp. A half of the warp holds a tile.
template <class Type>
__device__ __forceinline__ void quantize_piece(const uint8_t* in, int columns, ScaleFormat format,
                                               uint8_t* out, uint8_t* scales, int lane) {
    for (int first = 0; first < columns; first += kPerStep) {
        const int column = first + lane * kPerLane;
        float values[kPerLane] = {};
        if (column < columns) load_values<Type>(in, column, values);
        float amax = 0.0f;
        // fmaxf returns the other operand when one is NaN: NaN is ignored.
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) amax = fmaxf(amax, fabsf(values[i]));
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) {
            amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, offset));
        }
        const TileScale scale = tile_scale(amax, format != ScaleFormat::kFp32);
        if (column < columns) *reinterpret_cast<uint2*>(out + column) = quantize_lane(values, scale.inverse);
        if (lane % 16 != 0) continue;
        const uint32_t bits = __float_as_uint(scale.scale);
        if (format == ScaleFormat::kUe8m0) {
            // Bytes of a packed word past the row's tiles are zero.
            scales[column / kTile] = column < columns ? static_cast<uint8_t>(bits >> 23) : uint8_t{0};
        } else if (column < columns) {
            reinterpret_cast<uint32_t*>(scales)[column / kTile] = bits;
        }
    }
    if (format == ScaleFormat::kUe8m0 && lane == 0) {
        // A step is two tiles: the second half of the last word may not have been reached.
        const int reached = (columns + kPerStep - 1) / kPerStep * (kPerStep / kTile);
        for (int tile = reached; tile % kTilesPerWord != 0; ++tile) scales[tile] = 0;
    }
}

template <class Type>
__global__ void __launch_bounds__(kMaxWarps * 32)
    dispatch_rows_fp8(const __grid_constant__ DispatchRowsArgs args, const Pieces pieces,
                      const WarpMemory memory) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint64_t loaded[kMaxWarps][kNumStages];
    __shared__ Destination destinations[kMaxPeers];
    constexpr int kElementBytes = sizeof(typename Type::Storage);
    const Domain& domain = args.domain;
    const int num_ranks = domain.num_ranks, num_warps = static_cast<int>(blockDim.x / 32);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    if (lane == 0) {
        for (int stage = 0; stage < kNumStages; ++stage) ptx::mbarrier_init(&loaded[warp][stage], 1);
        ptx::fence_mbarrier_init();
    }
    ptx::wait_for_earlier_kernels();
    const uint64_t epoch = sync::own_control(domain)->epoch + 1;
    if (args.announce && blockIdx.x == 0) announce_outputs(args, epoch);

    if (await_destinations(args, epoch, destinations)) {
        uint8_t* own = shared + warp * memory.bytes();
        PieceWalk now(static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x),
                      static_cast<int>(gridDim.x) * num_warps, pieces.count);
        PieceWalk ahead = now;
        auto load = [&](const PieceWalk& walk, int stage) {
            if (walk.row >= args.num_tokens || lane != 0) return;
            const uint32_t bytes = pieces.size(walk.piece) * kElementBytes;
            ptx::mbarrier_arrive_expect(&loaded[warp][stage], bytes);
            const int64_t begin = (walk.row * args.row_bytes + pieces.begin(walk.piece)) * kElementBytes;
            ptx::bulk_load(own + stage * memory.in_bytes, args.rows + begin, bytes, &loaded[warp][stage]);
        };
        load(ahead, 0);
        ahead.next();
        load(ahead, 1);
        int stage = 0;
        uint32_t parity = 0;
        for (; now.row < args.num_tokens; now.next()) {
            int32_t head = -1;
            if (lane < num_ranks) head = args.send_head[static_cast<int64_t>(now.row) * num_ranks + lane];
            // Rows beyond a fixed capacity are left out; dispatch_notify has told the hosts.
            const bool goes = head >= 0 && head < destinations[min(lane, num_ranks - 1)].capacity;
            const unsigned mask = __ballot_sync(kAllLanes, goes);
            uint8_t* out = own + memory.out_at(stage);
            uint8_t* scales = own + memory.scales_at(stage);
            const auto columns = static_cast<int>(pieces.size(now.piece));
            // The stores of two jobs ago have read `out`.
            if (lane == 0) ptx::bulk_wait_read<kNumStages - 1>();
            __syncwarp();
            const bool here =
                sync::await_bulk(domain, &loaded[warp][stage], parity, Operation::kDispatch, domain.rank);
            if (!__all_sync(kAllLanes, here)) break;
            if (mask != 0) {
                quantize_piece<Type>(own + stage * memory.in_bytes, columns, args.format, out, scales, lane);
                ptx::fence_proxy_async();
            }
            __syncwarp();
            ahead.next();
            load(ahead, stage);
            const int first_word = static_cast<int>(pieces.begin(now.piece)) /
                                   (args.format == ScaleFormat::kUe8m0 ? kGroup : kTile);
            const auto num_words = static_cast<int>(num_scale_columns(columns, args.format));
            for (unsigned left = mask; left != 0; left &= left - 1) {
                const int peer = __ffs(left) - 1;
                const Destination& to = destinations[peer];
                const int64_t row = __shfl_sync(kAllLanes, head, peer);
                if (lane == 0) {
                    ptx::bulk_store(to.rows + row * args.row_bytes + pieces.begin(now.piece), out, columns);
                }
                auto* words =
                    reinterpret_cast<uint32_t*>(to.scales) + row * args.scales_per_token + first_word;
                for (int i = lane; i < num_words; i += 32) {
                    words[i] = reinterpret_cast<const uint32_t*>(scales)[i];
                }
                if (now.piece == 0) send_routing(args, to, peer, now.row, row, lane);
            }
            if (lane == 0) ptx::bulk_commit();
            if (++stage == kNumStages) {
                stage = 0;
                parity ^= 1;
            }
        }
        if (lane == 0) ptx::bulk_wait_all();
    }
    sync::finish(domain, epoch, Operation::kDispatch);
}

// Pieces in columns, which are also the bytes of the result.
Pieces pieces_of(int64_t channels, int element_bytes) {
    const int64_t most = kMaxStageBytes / element_bytes / kGroup * kGroup;
    const int64_t count = (channels + most - 1) / most;
    const int64_t columns = ((channels + kGroup - 1) / kGroup + count - 1) / count * kGroup;
    return {channels, static_cast<int>(columns), static_cast<int>((channels + columns - 1) / columns)};
}

template <class Type>
void launch(const DispatchRowsArgs& args, int num_sms, cudaStream_t stream) {
    const Pieces pieces = pieces_of(args.row_bytes, sizeof(typename Type::Storage));
    const WarpMemory memory{pieces.bytes, pieces.bytes * static_cast<int>(sizeof(typename Type::Storage))};
    const int warps = std::min(kMaxWarps, kSharedBytes / memory.bytes());
    const int64_t jobs = static_cast<int64_t>(args.num_tokens) * pieces.count;
    check_limit(jobs, INT32_MAX / 2, "dispatch_rows_fp8", "the number of pieces of all rows");
    const auto blocks =
        static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(num_sms, (jobs + 3) / 4)));
    const auto shared = static_cast<size_t>(warps * memory.bytes());
    launch_early(dispatch_rows_fp8<Type>, blocks, warps * 32, shared, stream, "dispatch_rows_fp8", args,
                 pieces, memory);
}

}  // namespace

void prepare_dispatch_rows_fp8() {
    allow_shared_memory(dispatch_rows_fp8<Bf16>, kSharedBytes, "dispatch_rows_fp8");
    allow_shared_memory(dispatch_rows_fp8<Fp16>, kSharedBytes, "dispatch_rows_fp8");
    allow_shared_memory(dispatch_rows_fp8<Fp32>, kSharedBytes, "dispatch_rows_fp8");
}

void launch_dispatch_rows_fp8(const DispatchRowsArgs& args, int num_sms, Stream stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    switch (args.type) {
        case ElementType::kBf16:
            return launch<Bf16>(args, num_sms, cuda_stream);
        case ElementType::kFp16:
            return launch<Fp16>(args, num_sms, cuda_stream);
        case ElementType::kFp32:
            return launch<Fp32>(args, num_sms, cuda_stream);
    }
}

}  // namespace deep_ep
