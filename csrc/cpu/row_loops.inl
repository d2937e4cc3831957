// Included by isa_*.cpp inside a namespace of its own, with DEEP_EP_VECTOR_BYTES and
// DEEP_EP_LOOPS_NAME defined; it leaves the table kLoops. Written with compiler vector types: the same source is SSE2, AVX2, AVX-512 or NEON.
//
// Bits: every float operation below is one IEEE operation (the build forbids contraction and fast-math), and NaN
// results are written as one fixed pattern per type, since processors differ in the payload they give a NaN.

constexpr int kVectorBytes = DEEP_EP_VECTOR_BYTES;
constexpr int kLanes = kVectorBytes / 4;

typedef float F32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t I32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t U8 __attribute__((vector_size(kVectorBytes / 4)));

#define DEEP_EP_INLINE static inline __attribute__((always_inline))

template <class V, class T>
DEEP_EP_INLINE V load(const T* p) {
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
}
template <class V, class T>
DEEP_EP_INLINE void store(T* p, V v) {
    memcpy(p, &v, sizeof(V));
}
// Between lane widths. Compilers split the general conversion into halves, so an instruction set may name its own.
#ifdef DEEP_EP_WIDEN_U16
DEEP_EP_INLINE U32 widen_lanes(U16 v) {
    return (U32)DEEP_EP_WIDEN_U16(v);
}
DEEP_EP_INLINE U32 widen_lanes(U8 v) {
    return (U32)DEEP_EP_WIDEN_U8(v);
}
DEEP_EP_INLINE U16 narrow_to_u16(U32 v) {
    return (U16)DEEP_EP_NARROW_U16(v);
}
#else
DEEP_EP_INLINE U32 widen_lanes(U16 v) {
    return __builtin_convertvector(v, U32);
}
DEEP_EP_INLINE U32 widen_lanes(U8 v) {
    return __builtin_convertvector(v, U32);
}
DEEP_EP_INLINE U16 narrow_to_u16(U32 v) {
    return __builtin_convertvector(v, U16);
}
#endif
#ifdef DEEP_EP_NARROW_U8
DEEP_EP_INLINE U8 narrow_to_u8(U32 v) {
    return (U8)DEEP_EP_NARROW_U8(v);
}
#else
DEEP_EP_INLINE U8 narrow_to_u8(U32 v) {
    return __builtin_convertvector(v, U8);
}
#endif
DEEP_EP_INLINE U32 splat(uint32_t v) {
    return U32{} + v;
}
DEEP_EP_INLINE F32 splat(float v) {
    return F32{} + v;
}
DEEP_EP_INLINE uint32_t float_bits(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}
DEEP_EP_INLINE float bits_float(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

DEEP_EP_INLINE U32 select(I32 mask, U32 a, U32 b) {
    return mask ? a : b;
}
// Magnitudes (sign bit clear) compare alike as signed integers and as floats, with every NaN above infinity.
DEEP_EP_INLINE I32 above(U32 magnitude, uint32_t limit) {
    return (I32)magnitude > (I32)splat(limit);
}
constexpr uint32_t kInfinity = 0x7F800000u;

// ---- element types: storage, widening to FP32 (exact) and rounding from FP32 (nearest even) ----

struct Bf16 {
    using Storage = uint16_t;
    static constexpr uint32_t kMagnitude = 0x7FFF, kInf = 0x7F80;
    DEEP_EP_INLINE F32 widen(const Storage* p) { return (F32)(widen_lanes(load<U16>(p)) << 16); }
    DEEP_EP_INLINE float widen_one(Storage v) { return bits_float((uint32_t)v << 16); }
    DEEP_EP_INLINE void round_to(Storage* p, F32 v) { store(p, narrow_to_u16(rounded_bits(v))); }
    DEEP_EP_INLINE F32 round(F32 v) { return (F32)(rounded_bits(v) << 16); }
    DEEP_EP_INLINE U32 rounded_bits(F32 v) {
        const U32 bits = (U32)v;
        const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        return select(above(bits & 0x7FFFFFFFu, kInfinity), splat(0x7FC0u), rounded);
    }
};

struct Fp16 {
    using Storage = uint16_t;
    static constexpr uint32_t kMagnitude = 0x7FFF, kInf = 0x7C00;
    DEEP_EP_INLINE F32 widen_bits(U32 half) {
        const U32 sign = (half & 0x8000u) << 16;
        const U32 shifted = (half & 0x7FFFu) << 13;
        const I32 special = above(shifted, (0x7C00u << 13) - 1);
        // A subnormal half is read as 2^-14 * (1 + m), from which 2^-14 is taken: exact, and free of FP32 subnormals.
        const U32 subnormal = (U32)((F32)(shifted + (113u << 23)) - splat(0x1p-14f));
        const U32 normal = shifted + (112u << 23);
        const U32 finite = select(above(shifted, (0x0400u << 13) - 1), normal, subnormal);
        return (F32)(sign | select(special, shifted + (224u << 23), finite));
    }
    DEEP_EP_INLINE F32 widen(const Storage* p) { return widen_bits(widen_lanes(load<U16>(p))); }
    DEEP_EP_INLINE float widen_one(Storage v) { return widen_bits(splat((uint32_t)v))[0]; }
    DEEP_EP_INLINE void round_to(Storage* p, F32 v) { store(p, narrow_to_u16(rounded_bits(v))); }
    DEEP_EP_INLINE F32 round(F32 v) { return widen_bits(rounded_bits(v)); }
    DEEP_EP_INLINE U32 rounded_bits(F32 v) {
        const U32 bits = (U32)v;
        const U32 magnitude = bits & 0x7FFFFFFFu;
        const U32 normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
        // One unit in the last place of 0.5 is the smallest half, so the addition itself rounds to it.
        const U32 subnormal = (U32)((F32)magnitude + splat(0.5f)) - 0x3F000000u;
        U32 result = select(above(magnitude, 0x387FFFFFu), normal, subnormal);
        result = select(above(magnitude, 0x477FFFFFu), splat(0x7C00u), result) | ((bits >> 16) & 0x8000u);
        return select(above(magnitude, kInfinity), splat(0x7E00u), result);
    }
};

struct Fp32 {
    using Storage = float;
    static constexpr uint32_t kMagnitude = 0x7FFFFFFF, kInf = kInfinity;
    DEEP_EP_INLINE F32 widen(const Storage* p) { return load<F32>(p); }
    DEEP_EP_INLINE float widen_one(Storage v) { return v; }
    DEEP_EP_INLINE void round_to(Storage* p, F32 v) { store(p, round(v)); }
    DEEP_EP_INLINE F32 round(F32 v) {
        return (F32)select(above((U32)v & 0x7FFFFFFFu, kInfinity), splat(0x7FC00000u), (U32)v);
    }
};

// ---- E4M3 ----

// Nearest even, saturating at 448, NaN (of either sign) becomes 0x7F.
DEEP_EP_INLINE U32 to_e4m3(F32 v) {
    const U32 bits = (U32)v;
    const U32 magnitude = bits & 0x7FFFFFFFu;
    const U32 normal = (magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u) - (120u << 23)) >> 20;
    // One unit in the last place of 16384 is 2^-9, the smallest E4M3 value: the addition rounds to it.
    const U32 subnormal = (U32)((F32)magnitude + splat(16384.0f)) - 0x46800000u;
    U32 result = select(above(magnitude, 0x3C7FFFFFu), normal, subnormal);
    result = select(above(magnitude, 0x43E00000u), splat(0x7Eu), result) | ((bits >> 24) & 0x80u);
    return select(above(magnitude, kInfinity), splat(0x7Fu), result);
}

DEEP_EP_INLINE F32 from_e4m3(U32 code) {
    const U32 sign = (code & 0x80u) << 24;
    const U32 magnitude = code & 0x7Fu;
    const U32 normal = (magnitude << 20) + (120u << 23);
    const U32 subnormal = (U32)(__builtin_convertvector((I32)magnitude, F32) * splat(0x1p-9f));
    const U32 finite = sign | select(above(magnitude, 7u), normal, subnormal);
    return (F32)select(above(magnitude, 0x7Eu), splat(0x7FC00000u), finite);
}

struct TileScale {
    float scale, inverse;
};

DEEP_EP_INLINE TileScale tile_scale(float amax, bool pow2) {
    amax = amax > kAmaxFloor ? amax : kAmaxFloor;
    float scale = amax / kE4m3Max;
    if (!pow2) return {scale, kE4m3Max / amax};
    // The quotient is never subnormal (1e-4 / 448 = 2.2e-7), so its exponent field is the logarithm, rounded up by any
    // set mantissa bit.
    const uint32_t bits = float_bits(scale);
    scale = bits_float((bits + 0x7FFFFFu) & kInfinity);
    return {scale, 1.0f / scale};
}

// Largest magnitude of kTile values, NaN ignored. On the bits, where magnitudes order like integers.
template <class E>
DEEP_EP_INLINE float tile_amax(const typename E::Storage* x) {
    if constexpr (sizeof(typename E::Storage) == 2) {
        typedef int16_t V __attribute__((vector_size(kVectorBytes)));
        constexpr int kCount = kVectorBytes / 2;
        V best{};
        for (int i = 0; i < kTile; i += kCount) {
            const V a = load<V>(x + i) & (int16_t)E::kMagnitude;
            const V b = a > (int16_t)E::kInf ? V{} : a;
            best = b > best ? b : best;
        }
        int16_t lanes[kCount];
        store(lanes, best);
        int16_t result = 0;
        for (int i = 0; i < kCount; ++i) result = lanes[i] > result ? lanes[i] : result;
        return E::widen_one((uint16_t)result);
    } else {
        I32 best{};
        for (int i = 0; i < kTile; i += kLanes) {
            const I32 a = load<I32>(x + i) & (int32_t)E::kMagnitude;
            const I32 b = a > (int32_t)E::kInf ? I32{} : a;
            best = b > best ? b : best;
        }
        int32_t lanes[kLanes];
        store(lanes, best);
        int32_t result = 0;
        for (int i = 0; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
        return bits_float((uint32_t)result);
    }
}

template <class E>
DEEP_EP_INLINE void cast_tile(const typename E::Storage* x, float inverse, uint8_t* q) {
    const F32 factor = splat(inverse);
    for (int i = 0; i < kTile; i += kLanes) {
        store(q + i, narrow_to_u8(to_e4m3(E::widen(x + i) * factor)));
    }
}

template <class E>
DEEP_EP_INLINE void cast_values(const typename E::Storage* x, int count, float inverse, uint8_t* q) {
    if (count == kTile) return cast_tile<E>(x, inverse, q);
    typename E::Storage padded[kTile] = {};
    uint8_t codes[kTile];
    memcpy(padded, x, (size_t)count * sizeof(x[0]));
    cast_tile<E>(padded, inverse, codes);
    memcpy(q, codes, (size_t)count);
}

template <class E>
DEEP_EP_INLINE float values_amax(const typename E::Storage* x, int count) {
    if (count == kTile) return tile_amax<E>(x);
    typename E::Storage padded[kTile] = {};
    memcpy(padded, x, (size_t)count * sizeof(x[0]));
    return tile_amax<E>(padded);
}

template <class E>
static void quantize_row(const void* x_row, int64_t channels, bool pow2, uint8_t* q, float* scales) {
    const auto* x = static_cast<const typename E::Storage*>(x_row);
    // A few tiles at a time, in three short loops: within one loop the tiles are independent, so the latency of a tile's
    // maximum and of its two divisions hides behind its neighbours'. 32 bf16 tiles are 8 KB, well inside the L1 cache.
    constexpr int kStrip = 32;
    float amax[kStrip], inverse[kStrip];
    for (int64_t strip = 0; strip < channels; strip += kStrip * kTile) {
        const int64_t left = channels - strip;
        const int whole = left < kStrip * kTile ? (int)(left / kTile) : kStrip;
        const int rest = whole < kStrip ? (int)(left % kTile) : 0;
        const int tiles = whole + (rest > 0);
        const auto* values = x + strip;
        for (int tile = 0; tile < whole; ++tile) amax[tile] = tile_amax<E>(values + tile * kTile);
        if (rest > 0) amax[whole] = values_amax<E>(values + whole * kTile, rest);
        for (int tile = 0; tile < tiles; ++tile) {
            const TileScale s = tile_scale(amax[tile], pow2);
            scales[strip / kTile + tile] = s.scale;
            inverse[tile] = s.inverse;
        }
        for (int tile = 0; tile < whole; ++tile) {
            cast_tile<E>(values + tile * kTile, inverse[tile], q + strip + tile * kTile);
        }
        if (rest > 0) cast_values<E>(values + whole * kTile, rest, inverse[whole], q + strip + whole * kTile);
    }
}

template <class E>
static float quantize_block(const void* x_block, int64_t x_stride, int rows, int columns, bool pow2,
                            uint8_t* q, int64_t q_stride) {
    const auto* x = static_cast<const typename E::Storage*>(x_block);
    float amax = 0.0f;
    for (int row = 0; row < rows; ++row) {
        const float row_amax = values_amax<E>(x + row * x_stride, columns);
        amax = row_amax > amax ? row_amax : amax;
    }
    const TileScale s = tile_scale(amax, pow2);
    for (int row = 0; row < rows; ++row) {
        cast_values<E>(x + row * x_stride, columns, s.inverse, q + row * q_stride);
    }
    return s.scale;
}

template <class E>
static void quantize_transposed_tile(const TransposeTile& args) {
    const auto* x = static_cast<const typename E::Storage*>(args.x);
    // The tile as floats (32 KB) stays in the first-level cache through both passes.
    alignas(64) float values[kTile][kTransposeChannels];
    alignas(64) float inverse[kTransposeChannels];
    alignas(64) uint8_t codes[kTile][kTransposeChannels];
    for (int token = 0; token < args.num_tokens; ++token) {
        const auto* row = x + token * args.x_stride;
        typename E::Storage padded[kTransposeChannels] = {};
        if (args.num_channels < kTransposeChannels) {
            memcpy(padded, row, (size_t)args.num_channels * sizeof(row[0]));
            row = padded;
        }
        for (int c = 0; c < kTransposeChannels; c += kLanes) store(&values[token][c], E::widen(row + c));
    }
    for (int c = 0; c < kTransposeChannels; c += kLanes) {
        I32 best{};
        for (int token = 0; token < args.num_tokens; ++token) {
            const I32 a = load<I32>(&values[token][c]) & 0x7FFFFFFF;
            const I32 b = a > (int32_t)kInfinity ? I32{} : a;
            best = b > best ? b : best;
        }
        float amax[kLanes];
        store(amax, best);
        for (int lane = 0; lane < kLanes; ++lane) {
            const TileScale s = tile_scale(amax[lane], args.pow2);
            inverse[c + lane] = s.inverse;
            if (c + lane < args.num_channels) args.scales[c + lane] = s.scale;
        }
        const F32 factor = load<F32>(&inverse[c]);
        for (int token = 0; token < args.num_tokens; ++token) {
            const F32 v = load<F32>(&values[token][c]) * factor;
            store(&codes[token][c], narrow_to_u8(to_e4m3(v)));
        }
    }
    for (int c = 0; c < args.num_channels; ++c) {
        uint8_t* q = args.q + c * args.q_stride;
        for (int token = 0; token < args.num_tokens; ++token) q[token] = codes[token][c];
    }
}

template <class E>
static void dequantize_row(const uint8_t* q, int64_t channels, const float* scales, void* out_row) {
    auto* out = static_cast<typename E::Storage*>(out_row);
    auto cast = [](const uint8_t* tile, F32 scale, typename E::Storage* target) {
        for (int i = 0; i < kTile; i += kLanes) {
            E::round_to(target + i, from_e4m3(widen_lanes(load<U8>(tile + i))) * scale);
        }
    };
    const int64_t whole = channels / kTile;
    for (int64_t tile = 0; tile < whole; ++tile)
        cast(q + tile * kTile, splat(scales[tile]), out + tile * kTile);
    const int64_t rest = channels % kTile;
    if (rest == 0) return;
    uint8_t padded_q[kTile] = {};
    typename E::Storage padded_out[kTile];
    memcpy(padded_q, q + whole * kTile, (size_t)rest);
    cast(padded_q, splat(scales[whole]), padded_out);
    memcpy(out + whole * kTile, padded_out, (size_t)rest * sizeof(padded_out[0]));
}

// ---- sums ----

// `kUnroll` vectors of a row at once: the accumulators stay in registers while the rows stream by.
template <class In, class Out, int kUnroll, bool kGrouped>
DEEP_EP_INLINE void reduce_columns(const ReduceRow& args, int64_t column, typename Out::Storage* out) {
    F32 sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = F32{};
    for (int i = 0; i < args.num_biases; ++i) {
        const auto* row = static_cast<const typename In::Storage*>(args.biases[i].row) + column;
        for (int u = 0; u < kUnroll; ++u) sum[u] = sum[u] + In::widen(row + u * kLanes);
    }
    F32 partial[kUnroll];
    for (int u = 0; u < kUnroll; ++u) partial[u] = F32{};
    for (int i = 0; i < args.num_terms; ++i) {
        const RowTerm& term = args.terms[i];
        const auto* row = static_cast<const typename In::Storage*>(term.row) + column;
        const F32 weight = splat(term.weight);
        for (int u = 0; u < kUnroll; ++u) {
            // A weight of 1 changes no bit, so unweighted sums need no version of their own.
            const F32 v = In::widen(row + u * kLanes) * weight;
            if (kGrouped) {
                partial[u] = partial[u] + v;
            } else {
                sum[u] = sum[u] + v;
            }
        }
        if (kGrouped && term.closes_group) {
            for (int u = 0; u < kUnroll; ++u) {
                sum[u] = sum[u] + Out::round(partial[u]);
                partial[u] = F32{};
            }
        }
    }
    for (int u = 0; u < kUnroll; ++u) Out::round_to(out + u * kLanes, sum[u]);
}

template <class In, class Out, bool kGrouped>
DEEP_EP_INLINE void reduce_all_columns(const ReduceRow& args) {
    constexpr int kUnroll = 4;
    auto* out = static_cast<typename Out::Storage*>(args.out);
    int64_t column = 0;
    for (; column + kUnroll * kLanes <= args.hidden; column += kUnroll * kLanes) {
        reduce_columns<In, Out, kUnroll, kGrouped>(args, column, out + column);
    }
    for (; column + kLanes <= args.hidden; column += kLanes) {
        reduce_columns<In, Out, 1, kGrouped>(args, column, out + column);
    }
    if (column == args.hidden) return;
    // The last few columns: every row's remainder is summed from a padded copy, one vector wide.
    const int count = (int)(args.hidden - column);
    F32 sum{}, partial{};
    auto widen_rest = [&](const void* row) {
        typename In::Storage padded[kLanes] = {};
        memcpy(padded, static_cast<const typename In::Storage*>(row) + column,
               (size_t)count * sizeof(padded[0]));
        return In::widen(padded);
    };
    for (int i = 0; i < args.num_biases; ++i) sum = sum + widen_rest(args.biases[i].row);
    for (int i = 0; i < args.num_terms; ++i) {
        const F32 v = widen_rest(args.terms[i].row) * splat(args.terms[i].weight);
        if (!kGrouped) {
            sum = sum + v;
            continue;
        }
        partial = partial + v;
        if (args.terms[i].closes_group) {
            sum = sum + Out::round(partial);
            partial = F32{};
        }
    }
    typename Out::Storage rest[kLanes];
    Out::round_to(rest, sum);
    memcpy(out + column, rest, (size_t)count * sizeof(rest[0]));
}

template <class In, class Out>
static void reduce_row(const ReduceRow& args) {
    if (args.grouped) {
        reduce_all_columns<In, Out, true>(args);
    } else {
        reduce_all_columns<In, Out, false>(args);
    }
}

// ---- LogFMT ----

DEEP_EP_INLINE U32 bits_of(F32 v) {
    return (U32)v;
}
DEEP_EP_INLINE F32 float_of(U32 v) {
    return (F32)v;
}
DEEP_EP_INLINE I32 signed_of(U32 v) {
    return (I32)v;
}
DEEP_EP_INLINE U32 unsigned_of(I32 v) {
    return (U32)v;
}
DEEP_EP_INLINE F32 to_float(I32 v) {
    return __builtin_convertvector(v, F32);
}
DEEP_EP_INLINE I32 to_int(F32 v) {
    return __builtin_convertvector(v, I32);
}

#include "layout/logfmt_math.inl"

static void logfmt_encode_group(const uint16_t* x, LogFmtGroup group, uint16_t* codes) {
    const LogFmtEncoder encoder = logfmt_encoder(group);
    for (int i = 0; i < kTile; i += kLanes) {
        store(codes + i, narrow_to_u16(logfmt_code(widen_lanes(load<U16>(x + i)), encoder)));
    }
}

static void logfmt_decode_group(const uint16_t* codes, LogFmtGroup group, uint16_t* x) {
    const LogFmtScale scale = logfmt_scale(group);
    for (int i = 0; i < kTile; i += kLanes) {
        Bf16::round_to(x + i, logfmt_value(widen_lanes(load<U16>(codes + i)), scale));
    }
}

constexpr RowLoops kLoops = {
    DEEP_EP_LOOPS_NAME,
    {{reduce_row<Bf16, Bf16>, reduce_row<Bf16, Fp16>, reduce_row<Bf16, Fp32>},
     {reduce_row<Fp16, Bf16>, reduce_row<Fp16, Fp16>, reduce_row<Fp16, Fp32>},
     {reduce_row<Fp32, Bf16>, reduce_row<Fp32, Fp16>, reduce_row<Fp32, Fp32>}},
    {quantize_row<Bf16>, quantize_row<Fp16>, quantize_row<Fp32>},
    {dequantize_row<Bf16>, dequantize_row<Fp16>, dequantize_row<Fp32>},
    {quantize_block<Bf16>, quantize_block<Fp16>, quantize_block<Fp32>},
    {quantize_transposed_tile<Bf16>, quantize_transposed_tile<Fp16>, quantize_transposed_tile<Fp32>},
    logfmt_encode_group,
    logfmt_decode_group,
};

#undef DEEP_EP_INLINE
