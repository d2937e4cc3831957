// Rows in LogFMT-10 (deep_ep/logfmt.py) as they travel in low-latency combine, a warp and a step of kStepBytes at a time.
//
// In a slot every step has the place that it has in a bf16 row, so pieces need not know each other's sizes, and the
// magnitudes of all groups lie behind the row. A step of a chunk that is cast fills the first 640 bytes of its place: the
// ten-bit codes of a lane's 16 values are 160 bits, lowest first; four words of each lane, then the fifth of each.
#pragma once

#include <cstdint>

#include "layout/elements.cuh"
#include "layout/logfmt_format.h"
#include "layout/low_latency_layout.h"

namespace deep_ep::logfmt {

using F32 = float;
using U32 = uint32_t;
using I32 = int32_t;
#define DEEP_EP_INLINE __device__ __forceinline__
DEEP_EP_INLINE F32 splat(float v) {
    return v;
}
DEEP_EP_INLINE U32 bits_of(F32 v) {
    return __float_as_uint(v);
}
DEEP_EP_INLINE F32 float_of(U32 v) {
    return __uint_as_float(v);
}
DEEP_EP_INLINE I32 signed_of(U32 v) {
    return static_cast<I32>(v);
}
DEEP_EP_INLINE U32 unsigned_of(I32 v) {
    return static_cast<U32>(v);
}
DEEP_EP_INLINE F32 to_float(I32 v) {
    return static_cast<F32>(v);
}
DEEP_EP_INLINE I32 to_int(F32 v) {
    return static_cast<I32>(v);
}
#include "layout/logfmt_math.inl"
#undef DEEP_EP_INLINE

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kHalfBytes = kStepBytes / 2;  // a half: 16 bytes, eight values, of each lane
constexpr int kPerLane = 8;
constexpr int kCodeBits = 10;
constexpr int kGroupLanes = kTile / kPerLane;  // lanes that hold a group
constexpr int kStepGroups = kStepBytes / 2 / kTile;
using Values = Pack<uint16_t, kPerLane>;

// Steps of a chunk: groups of a chunk are cast together or not at all. Chunks begin at multiples of it.
DEEP_EP_HOST_DEVICE int chunk_steps(int hidden) {
    return logfmt_chunk(hidden) * 2 / kStepBytes;
}

// A row cut into pieces of whole chunks.
DEEP_EP_HOST_DEVICE RowPieces cut_row(int hidden, int64_t wanted) {
    const int steps = chunk_steps(hidden);
    const RowPieces chunks = deep_ep::cut_row(2 * static_cast<int64_t>(hidden) / steps, wanted);
    return {chunks.count, chunks.bytes * steps};
}

// What is loaded of a step before it is known what it is. Of a row: the step, and the other one of its chunk, or itself
// again. Of a slot: the lane's first 16 bytes, the word that would be the last of its codes, and a group's magnitudes.
struct Loaded {
    uint4 step[2], sibling[2];
    uint32_t group;
};

// A step in the form in which it travels. One answer for all lanes whether it is cast.
struct Coded {
    uint4 words[2];          // the values; or the lane's codes, of which words[1].x is the last word
    uint32_t magnitudes[2];  // of the groups that the lane's halves belong to: max, min in the upper half
    bool is_cast;
};

__device__ __forceinline__ LogFmtGroup group_of(uint32_t magnitudes) {
    return LogFmtGroup::of(static_cast<uint16_t>(magnitudes), static_cast<uint16_t>(magnitudes >> 16));
}

__device__ __forceinline__ bool can_be_cast(uint32_t magnitudes) {
    return group_of(magnitudes).can_be_cast();
}

// The largest and the smallest nonzero magnitude of a group, of which each lane has eight values; of zeros, zeros.
__device__ __forceinline__ uint32_t magnitudes_of(const uint4& values) {
    constexpr uint32_t kOnes = 0x00010001u;
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
    uint32_t most = 0, least_less_one = ~0u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t pair = words[i] & 0x7FFF7FFFu;
        most = __vmaxu2(most, pair);
        least_less_one = __vminu2(least_less_one, __vsub2(pair, kOnes));  // zero becomes the largest
    }
    // Both as largest halves of one word.
    uint32_t both =
        __vmaxu2(__byte_perm(most, ~least_less_one, 0x5410), __byte_perm(most, ~least_less_one, 0x7632));
#pragma unroll
    for (int offset = kGroupLanes / 2; offset > 0; offset /= 2) {
        both = __vmaxu2(both, __shfl_xor_sync(kAll, both, offset));
    }
    return (both & 0xFFFFu) | (0u - (both >> 16)) << 16;
}

// Of a row, null for zeros. per_chunk: see chunk_steps().
__device__ __forceinline__ Loaded load_row(const uint8_t* row, int per_chunk, int step, int lane) {
    Loaded loaded{};
    if (row == nullptr) return loaded;
    const auto* own = reinterpret_cast<const uint4*>(row + step * kStepBytes);
    const auto* other = reinterpret_cast<const uint4*>(row + (step ^ (per_chunk - 1)) * kStepBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        loaded.step[half] = own[half * 32 + lane];
        loaded.sibling[half] = other[half * 32 + lane];
    }
    return loaded;
}

__device__ __forceinline__ Coded encode(const Loaded& loaded) {
    Coded coded{};
    bool can = true;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        coded.magnitudes[half] = magnitudes_of(loaded.step[half]);
        const uint32_t others = magnitudes_of(loaded.sibling[half]);  // by all lanes, whatever `can` is
        can = can && can_be_cast(coded.magnitudes[half]) && can_be_cast(others);
    }
    coded.is_cast = __all_sync(kAll, can);
    if (!coded.is_cast) {
        coded.words[0] = loaded.step[0], coded.words[1] = loaded.step[1];
        return coded;
    }
    uint32_t words[2 * kPerLane * kCodeBits / 32] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const LogFmtEncoder encoder = logfmt_encoder(group_of(coded.magnitudes[half]));
        const uint4& v = loaded.step[half];
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const uint32_t code = logfmt_code(i % 2 == 0 ? pairs[i / 2] : pairs[i / 2] >> 16, encoder);
            const int bit = (half * kPerLane + i) * kCodeBits, word = bit / 32, shift = bit % 32;
            words[word] |= code << shift;
            if (shift + kCodeBits > 32) words[word + 1] |= code >> (32 - shift);
        }
    }
    coded.words[0] = {words[0], words[1], words[2], words[3]};
    coded.words[1].x = words[4];
    return coded;
}

// Rounded to bf16, which is what travels in plain chunks.
__device__ __forceinline__ void decode(const Coded& coded, Values (&values)[2]) {
    if (!coded.is_cast) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            values[half] = *reinterpret_cast<const Values*>(&coded.words[half]);
        return;
    }
    const uint4& w = coded.words[0];
    const uint32_t words[5] = {w.x, w.y, w.z, w.w, coded.words[1].x};
    VectorRounder<Bf16, kPerLane> rounder;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const LogFmtScale scale = logfmt_scale(group_of(coded.magnitudes[half]));
        float wide[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int bit = (half * kPerLane + i) * kCodeBits, word = bit / 32, shift = bit % 32;
            uint32_t code = words[word] >> shift;
            if (shift + kCodeBits > 32) code |= words[word + 1] << (32 - shift);
            wide[i] = logfmt_value(code, scale);
        }
        values[half] = rounder.round(wide);
    }
}

// A row's place at its home.
struct Slot {
    uint8_t* data;
    int hidden;

    __device__ __forceinline__ uint8_t* step(int step) const { return data + step * kStepBytes; }
    __device__ __forceinline__ uint32_t* groups(int step) const {
        return reinterpret_cast<uint32_t*>(data + 2 * hidden) + step * kStepGroups;
    }

    __device__ __forceinline__ void store(const Coded& coded, int at, int lane) const {
        uint8_t* to = step(at);
        reinterpret_cast<uint4*>(to)[lane] = coded.words[0];
        if (coded.is_cast) {
            reinterpret_cast<uint32_t*>(to + kHalfBytes)[lane] = coded.words[1].x;
        } else {
            reinterpret_cast<uint4*>(to + kHalfBytes)[lane] = coded.words[1];
        }
        // Groups in their order, one a lane.
        static_assert(kStepGroups == 4 && kGroupLanes == 16);
        const int from = lane % 2 * kGroupLanes;
        const uint32_t low = __shfl_sync(kAll, coded.magnitudes[0], from);
        const uint32_t high = __shfl_sync(kAll, coded.magnitudes[1], from);
        if (lane < kStepGroups) groups(at)[lane] = lane < 2 ? low : high;
    }

    // Plain loads: peers wrote it.
    __device__ __forceinline__ Loaded load(int per_chunk, int at, int lane) const {
        Loaded loaded{};
        const uint8_t* from = step(at);
        loaded.step[0] = reinterpret_cast<const uint4*>(from)[lane];
        loaded.step[1].x = reinterpret_cast<const uint32_t*>(from + kHalfBytes)[lane];
        loaded.group = groups(at & -per_chunk)[lane % (kStepGroups * per_chunk)];
        return loaded;
    }

    __device__ __forceinline__ Coded resolve(const Loaded& loaded, int per_chunk, int at, int lane) const {
        Coded coded;
        coded.words[0] = loaded.step[0], coded.words[1] = loaded.step[1];
        coded.is_cast = __all_sync(kAll, can_be_cast(loaded.group));
        const int group = (at & (per_chunk - 1)) * kStepGroups + lane / kGroupLanes;
        coded.magnitudes[0] = __shfl_sync(kAll, loaded.group, group);
        coded.magnitudes[1] = __shfl_sync(kAll, loaded.group, group + 2);
        if (!coded.is_cast) coded.words[1] = reinterpret_cast<const uint4*>(step(at) + kHalfBytes)[lane];
        return coded;
    }
};

// Stores the steps from `first` to `end` of rows at their home. `rows`: selections that have one; `row` is the lane's, null
// for zeros. slot_of(selection): where it goes.
template <class SlotOf>
__device__ __forceinline__ void store_rows(unsigned rows, const uint8_t* row, int first, int end, int hidden,
                                           const SlotOf& slot_of) {
    const int lane = static_cast<int>(threadIdx.x % 32), per_chunk = chunk_steps(hidden);
    const auto load = [&](int which, int step) {
        const auto at = __shfl_sync(kAll, reinterpret_cast<unsigned long long>(row), which);
        return load_row(reinterpret_cast<const uint8_t*>(at), per_chunk, step, lane);
    };
    unsigned left = first < end ? rows : 0;
    int step = first;
    // One step ahead.
    Loaded next{};
    if (left != 0) next = load(__ffs(left) - 1, step);
#pragma unroll 1
    while (left != 0) {
        const Loaded loaded = next;
        const Slot slot{slot_of(__ffs(left) - 1), hidden};
        const int at = step;
        if (++step == end) {
            step = first;
            left &= left - 1;
        }
        if (left != 0) next = load(__ffs(left) - 1, step);
        slot.store(encode(loaded), at, lane);
    }
}

// Adds a step of the rows at `mask`, each times its weight, in ascending order; `row` and `weight` are those of the lane. Those
// of `coded` lie in slots; the others are this rank's own, which lose what they would have lost on the way. Products and sums
// are single FP32 operations.
__device__ __forceinline__ void add_rows(float (&sum)[2][kPerLane], unsigned mask, unsigned coded,
                                         const uint8_t* row, float weight, int step, int hidden) {
    const int lane = static_cast<int>(threadIdx.x % 32), per_chunk = chunk_steps(hidden);
    const auto place_of = [&](int k) {
        const auto at = __shfl_sync(kAll, reinterpret_cast<unsigned long long>(row), k);
        return Slot{reinterpret_cast<uint8_t*>(at), hidden};
    };
    const auto load = [&](int k, const Slot& place) {
        return (coded >> k & 1u) != 0 ? place.load(per_chunk, step, lane)
                                      : load_row(place.data, per_chunk, step, lane);
    };
    // One row ahead.
    Slot next_place{};
    Loaded next{};
    if (mask != 0) next_place = place_of(__ffs(mask) - 1), next = load(__ffs(mask) - 1, next_place);
#pragma unroll 1
    while (mask != 0) {
        const int k = __ffs(mask) - 1;
        const Slot place = next_place;
        const Loaded loaded = next;
        mask &= mask - 1;
        if (mask != 0) next_place = place_of(__ffs(mask) - 1), next = load(__ffs(mask) - 1, next_place);
        const bool has_travelled = (coded >> k & 1u) != 0;
        Values parts[2];
        decode(has_travelled ? place.resolve(loaded, per_chunk, step, lane) : encode(loaded), parts);
        const float times = __shfl_sync(kAll, weight, k);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float wide[kPerLane];
            widen_vector<Bf16, kPerLane>(parts[half], wide);
#pragma unroll
            for (int c = 0; c < kPerLane; ++c)
                sum[half][c] = __fadd_rn(sum[half][c], __fmul_rn(wide[c], times));
        }
    }
}

}  // namespace deep_ep::logfmt
