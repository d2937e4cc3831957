#include <algorithm>

#include "kernels/launch.h"
#include "layout/elements.cuh"
#include "runtime/errors.h"

namespace deep_ep {
namespace {

constexpr int kNumThreads = 256;
constexpr int64_t kMaxGrid = 0x7FFFFFFF;

template <class In>
__device__ __forceinline__ const typename In::Storage* row_of(const ReduceSource& source, int64_t row) {
    const auto* base = static_cast<const uint8_t*>(source.rows);
    return reinterpret_cast<const typename In::Storage*>(base + row * source.stride);
}

// kCount channels of one token, from `channel` on. The order of the additions is the contract: bias rows, then columns.
template <class In, class Out, int kCount>
__device__ __forceinline__ void reduce_channels(const ReduceRowsArgs& args, int64_t token, int64_t channel) {
    using InPack = Pack<typename In::Storage, kCount>;
    using OutPack = Pack<typename Out::Storage, kCount>;
    float sum[kCount], partial[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = partial[i] = 0.0f;
    for (int bias = 0; bias < args.num_biases; ++bias) {
        const InPack row = *reinterpret_cast<const InPack*>(row_of<In>(args.biases[bias], token) + channel);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[i] = __fadd_rn(sum[i], In::widen(row.v[i]));
    }
    const bool grouped = args.round_every > 0;
    int left_in_group = args.round_every;
    for (int column = 0; column < args.num_columns; ++column) {
        const int32_t slot = args.slots[token * args.slots_stride + column];
        if (slot >= 0 && slot < args.columns[column].num_rows) {
            const float weight =
                args.weights == nullptr ? 1.0f : args.weights[token * args.weights_stride + column];
            const InPack row =
                *reinterpret_cast<const InPack*>(row_of<In>(args.columns[column], slot) + channel);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const float v = __fmul_rn(In::widen(row.v[i]), weight);
                float& target = grouped ? partial[i] : sum[i];
                target = __fadd_rn(target, v);
            }
        }
        if (grouped && (--left_in_group == 0 || column + 1 == args.num_columns)) {
            left_in_group = args.round_every;
            // Adding an empty group's +0 changes no bit, since a sum that started at +0 is never -0.
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                sum[i] = __fadd_rn(sum[i], Out::widen(Out::round(partial[i])));
                partial[i] = 0.0f;
            }
        }
    }
    OutPack result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.v[i] = Out::round(sum[i]);
    auto* out =
        reinterpret_cast<typename Out::Storage*>(static_cast<uint8_t*>(args.out) + token * args.out_stride);
    *reinterpret_cast<OutPack*>(out + channel) = result;
}

template <class In, class Out>
__global__ void __launch_bounds__(kNumThreads)
    combine_reduce_rows(const __grid_constant__ ReduceRowsArgs args) {
    // As many channels as fill 16 bytes of the wider of the two types: 8 for bf16 to bf16, 4 where FP32 takes part.
    constexpr int kCount =
        16 / (sizeof(typename In::Storage) > sizeof(typename Out::Storage) ? sizeof(typename In::Storage)
                                                                           : sizeof(typename Out::Storage));
    for (int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x) {
        if (args.vectorized) {
            for (int64_t c = threadIdx.x * kCount; c < args.hidden; c += kNumThreads * kCount) {
                reduce_channels<In, Out, kCount>(args, token, c);
            }
        } else {
            for (int64_t c = threadIdx.x; c < args.hidden; c += kNumThreads) {
                reduce_channels<In, Out, 1>(args, token, c);
            }
        }
    }
}

template <class In, class Out>
void launch(const ReduceRowsArgs& args, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(std::min(args.num_tokens, kMaxGrid));
    combine_reduce_rows<In, Out><<<blocks, kNumThreads, 0, stream>>>(args);
    check_launch("combine_reduce_rows");
}

template <class In>
void launch(const ReduceRowsArgs& args, ElementType out, cudaStream_t stream) {
    switch (out) {
        case ElementType::kBf16:
            return launch<In, Bf16>(args, stream);
        case ElementType::kFp16:
            return launch<In, Fp16>(args, stream);
        case ElementType::kFp32:
            return launch<In, Fp32>(args, stream);
    }
}

bool all_aligned(const ReduceRowsArgs& args) {
    uint64_t together = reinterpret_cast<uintptr_t>(args.out) | static_cast<uint64_t>(args.out_stride);
    auto add = [&](const ReduceSource* sources, int count) {
        for (int i = 0; i < count; ++i) {
            together |=
                reinterpret_cast<uintptr_t>(sources[i].rows) | static_cast<uint64_t>(sources[i].stride);
        }
    };
    add(args.columns, args.num_columns);
    add(args.biases, args.num_biases);
    return together % 16 == 0 && args.hidden % 8 == 0;
}

}  // namespace

void launch_combine_reduce_rows(ReduceRowsArgs args, ElementType in, ElementType out, Stream stream) {
    check_limit(args.num_columns, kMaxReduceColumns, "combine_reduce_rows", "the number of columns");
    check_limit(args.num_biases, kMaxReduceBiases, "combine_reduce_rows", "the number of bias tensors");
    if (args.num_tokens == 0 || args.hidden == 0) return;
    args.vectorized = all_aligned(args);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    switch (in) {
        case ElementType::kBf16:
            return launch<Bf16>(args, out, cuda_stream);
        case ElementType::kFp16:
            return launch<Fp16>(args, out, cuda_stream);
        case ElementType::kFp32:
            return launch<Fp32>(args, out, cuda_stream);
    }
}

}  // namespace deep_ep
