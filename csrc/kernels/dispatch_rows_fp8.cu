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

constexpr int kMaxWarps = 11;
constexpr int kNumStages = 3;
constexpr int kPerVector = 8;  // columns that a lane takes at a time
constexpr int kTileLanes = 4;  // lanes that share a tile
constexpr int kVectors = kTile / (kTileLanes * kPerVector);
constexpr int kStepTiles = 32 / kTileLanes;  // tiles of a warp at a time
constexpr int kStep = kStepTiles * kTile;    // columns; pieces end between steps, and so between packed words
constexpr int kMaxStageBytes = 6144;
constexpr int kMaxStepsPiece = kMaxStageBytes / 2 / kStep;
constexpr int kScaleBytes = kMaxStepsPiece * kStepTiles * 4;
constexpr int kSharedBytes = kMaxWarps * kNumStages * (kMaxStageBytes + kScaleBytes);
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

template <class Type>
__device__ __forceinline__ void widen_columns(const typename Type::Storage* from, float (&to)[kPerVector]) {
    constexpr int kPerLoad = 16 / sizeof(typename Type::Storage);
    const auto* loads = reinterpret_cast<const Pack<typename Type::Storage, kPerLoad>*>(from);
#pragma unroll
    for (int l = 0; l < kPerVector / kPerLoad; ++l) {
        float part[kPerLoad];
        widen_vector<Type, kPerLoad>(loads[l], part);
#pragma unroll
        for (int i = 0; i < kPerLoad; ++i) to[l * kPerLoad + i] = part[i];
    }
}

// Eight codes of E4M3. The instruction saturates at 448, and makes 0x7F of a NaN of either sign, as to_e4m3 does.
__device__ __forceinline__ uint2 quantize_vector(const float (&values)[kPerVector], float inverse) {
    Pack<uint16_t, kPerVector / 2> codes;
#pragma unroll
    for (int i = 0; i < kPerVector; i += 2) {
        codes.v[i / 2] = __nv_cvt_float2_to_fp8x2(
            make_float2(__fmul_rn(values[i], inverse), __fmul_rn(values[i + 1], inverse)), __NV_SATFINITE,
            __NV_E4M3);
    }
    return *reinterpret_cast<const uint2*>(&codes);
}

// Eight tiles from column `first` on, by a warp, in place: the codes of column c go to byte c of the piece, which lies
// before what is still to be read. Few lanes share a tile, so that what a tile needs once, its maximum and its divisions,
// costs little; they take its vectors in an order that differs from tile to tile, so that lanes use different banks.
// kFull: all columns exist.
template <class Type, bool kFull>
__device__ __forceinline__ void quantize_step(uint8_t* piece, int first, int columns, ScaleFormat format,
                                              uint8_t* scales, int lane) {
    using Storage = typename Type::Storage;
    struct alignas(16) Columns {
        Storage v[kPerVector];
    };
    const int tile = first / kTile + lane / kTileLanes;
    const int begin = tile * kTile + lane % kTileLanes * kPerVector;
    auto column_of = [&](int v) { return begin + (v ^ tile % kVectors) * kTileLanes * kPerVector; };
    Columns values[kVectors] = {};
    Magnitude<Type> magnitude;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (kFull || column_of(v) < columns) {
            values[v] =
                *reinterpret_cast<const Columns*>(reinterpret_cast<const Storage*>(piece) + column_of(v));
        }
        magnitude.add(*reinterpret_cast<const Pack<Storage, kPerVector>*>(&values[v]));
    }
    float amax = magnitude.get();
    // All lanes have read what is written over below.
#pragma unroll
    for (int offset = kTileLanes / 2; offset > 0; offset /= 2) {
        amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, offset));
    }
    const TileScale scale = tile_scale(amax, format != ScaleFormat::kFp32);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
        if (!kFull && column_of(v) >= columns) continue;
        float wide[kPerVector];
        widen_columns<Type>(values[v].v, wide);
        *reinterpret_cast<uint2*>(piece + column_of(v)) = quantize_vector(wide, scale.inverse);
    }
    if (lane % kTileLanes != 0) return;
    const uint32_t bits = __float_as_uint(scale.scale);
    if (format == ScaleFormat::kUe8m0) {
        // Bytes of a packed word past the row's tiles are zero.
        scales[tile] = kFull || tile * kTile < columns ? static_cast<uint8_t>(bits >> 23) : uint8_t{0};
    } else {
        reinterpret_cast<uint32_t*>(scales)[tile] = bits;
    }
}

template <class Type>
__device__ __forceinline__ void quantize_piece(uint8_t* piece, int columns, ScaleFormat format,
                                               uint8_t* scales, int lane) {
    int first = 0;
    for (; first + kStep <= columns; first += kStep) {
        quantize_step<Type, true>(piece, first, columns, format, scales, lane);
    }
    if (first < columns) quantize_step<Type, false>(piece, first, columns, format, scales, lane);
}

template <class Type>
__global__ void __launch_bounds__(kMaxWarps * 32)
    dispatch_rows_fp8(const __grid_constant__ DispatchRowsArgs args, const Pieces pieces) {
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
    const uint64_t epoch = begin_rows(args);
    if (await_destinations(args, epoch, destinations)) {
        uint8_t* own = shared + warp * kNumStages * (kMaxStageBytes + kScaleBytes);
        uint8_t* own_scales = own + kNumStages * kMaxStageBytes;
        PieceWalk now(static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x),
                      static_cast<int>(gridDim.x) * num_warps, pieces.count);
        PieceWalk ahead = now;
        auto load = [&](int stage) {
            if (ahead.row < args.num_tokens && lane == 0) {
                const uint32_t bytes = pieces.size(ahead.piece) * kElementBytes;
                ptx::mbarrier_arrive_expect(&loaded[warp][stage], bytes);
                const int64_t begin =
                    (ahead.row * args.row_bytes + pieces.begin(ahead.piece)) * kElementBytes;
                ptx::bulk_load(own + stage * kMaxStageBytes, args.rows + begin, bytes, &loaded[warp][stage]);
            }
            ahead.next();
        };
        auto head_of = [&](const PieceWalk& walk) {
            const bool has = walk.row < args.num_tokens && lane < num_ranks;
            return has ? args.send_head[static_cast<int64_t>(walk.row) * num_ranks + lane] : -1;
        };
        for (int stage = 0; stage < kNumStages - 1; ++stage) load(stage);
        const int64_t capacity = destinations[min(lane, num_ranks - 1)].capacity;
        const int group = args.format == ScaleFormat::kUe8m0 ? kTile * kTilesPerWord : kTile;
        const bool has_places = await_places(args, epoch);
        int32_t next_head = has_places ? head_of(now) : -1;
        int stage = 0;
        uint32_t parity = 0;
        while (now.row < args.num_tokens) {
            const int32_t head = next_head;
            const int token = now.row, piece = now.piece;
            Routing routing{};
            if (piece == 0) routing = read_routing(args, token, lane);
            now.next();
            next_head = has_places ? head_of(now) : -1;
            // Rows beyond a fixed capacity are left out; dispatch_notify has told the hosts.
            const unsigned mask = __ballot_sync(kAllLanes, head >= 0 && head < capacity);
            uint8_t* row_piece = own + stage * kMaxStageBytes;
            uint8_t* scales = own_scales + stage * kScaleBytes;
            const auto columns = static_cast<int>(pieces.size(piece));
            const bool here =
                sync::await_bulk(domain, &loaded[warp][stage], parity, Operation::kDispatch, domain.rank);
            if (!__all_sync(kAllLanes, here)) break;
            if (mask != 0) {
                quantize_piece<Type>(row_piece, columns, args.format, scales, lane);
                ptx::fence_proxy_async_shared();
            }
            __syncwarp();
            const auto begin = static_cast<int>(pieces.begin(piece));
            const auto num_words = static_cast<int>(num_scale_columns(columns, args.format));
            for (unsigned left = mask; left != 0; left &= left - 1) {
                const int peer = __ffs(left) - 1;
                const Destination& to = destinations[peer];
                const int64_t row = __shfl_sync(kAllLanes, head, peer);
                if (lane == 0) ptx::bulk_store(to.rows + row * args.row_bytes + begin, row_piece, columns);
                auto* words =
                    reinterpret_cast<uint32_t*>(to.scales) + row * args.scales_per_token + begin / group;
                for (int i = lane; i < num_words; i += 32) {
                    words[i] = reinterpret_cast<const uint32_t*>(scales)[i];
                }
                if (piece == 0) send_routing(args, to, token, row, routing, lane);
            }
            if (lane == 0) {
                ptx::bulk_commit();
                // The stage loaded next is that of the job before this one, whose stores have read it.
                ptx::bulk_wait_read<1>();
            }
            load(stage == 0 ? kNumStages - 1 : stage - 1);
            if (++stage == kNumStages) {
                stage = 0;
                parity ^= 1;
            }
        }
        if (lane == 0) ptx::bulk_wait_all();
    }
    end_rows(args, epoch);
}

// Pieces in columns, which are also the bytes of the result.
Pieces pieces_of(int64_t channels, int element_bytes) {
    const int columns = kMaxStageBytes / element_bytes / kStep * kStep;
    return {channels, columns, static_cast<int>((channels + columns - 1) / columns)};
}

template <class Type>
void launch(const DispatchRowsArgs& args, int num_sms, cudaStream_t stream) {
    const Pieces pieces = pieces_of(args.row_bytes, sizeof(typename Type::Storage));
    const int64_t jobs = static_cast<int64_t>(args.num_tokens) * pieces.count;
    check_limit(jobs, INT32_MAX / 2, "dispatch_rows_fp8", "the number of pieces of all rows");
    const auto blocks =
        static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(num_sms, (jobs + 3) / 4)));
    launch_early(dispatch_rows_fp8<Type>, blocks, kMaxWarps * 32, kSharedBytes, stream, "dispatch_rows_fp8",
                 args, pieces);
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
