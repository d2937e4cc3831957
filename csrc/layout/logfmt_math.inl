// The codes of LogFMT-10, the same source for CPU vectors and for single values on the device. Included inside a namespace
// where these are defined:
//   DEEP_EP_INLINE                qualifiers of a function
//   F32, U32, I32                 a float, unsigned or signed word, or vectors of as many of them
//   splat(float)                  F32 of one value
//   bits_of(F32), float_of(U32)   the same bits
//   signed_of(U32), unsigned_of(I32)
//   to_float(I32), to_int(F32)    conversions; to_int truncates
//
// Every float operation is one IEEE operation: the build forbids contraction and fast-math.

// log2 of positive normal values: exponent plus a polynomial of atanh in (m - 1) / (m + 1) with m in [sqrt(1/2), sqrt(2)).
// Error below 2^-22 in absolute terms, far below half a step (a step is 2^-4 at most but never below about 2^-16 here).
DEEP_EP_INLINE F32 log2_of(F32 v) {
    const U32 bits = bits_of(v);
    const U32 shifted = bits - 0x3F3504F3u;  // so that the exponent changes at sqrt(1/2)
    const I32 exponent = signed_of(shifted) >> 23;
    const F32 m = float_of(bits - (unsigned_of(exponent) << 23));
    const F32 s = (m - 1.0f) / (m + 1.0f);
    const F32 s2 = s * s;
    const F32 series =
        s * (2.8853900817779268f +
             s2 * (0.9617966939259756f + s2 * (0.5770780163555854f + s2 * 0.4121985831111324f)));
    return to_float(exponent) + series;
}

// 2^v for v in (-126, 1): a Taylor series around the nearest integer, relative error below 2^-22.
DEEP_EP_INLINE F32 exp2_of(F32 v) {
    const F32 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const F32 whole = (v + shift) - shift;
    const F32 t = (v - whole) * 0.6931471805599453f;
    const F32 p =
        1.0f + t * (1.0f + t * (0.5f + t * (0.16666667f +
                                            t * (0.041666668f + t * (0.008333334f + t * 0.0013888889f)))));
    return float_of(bits_of(p) + (unsigned_of(to_int(whole)) << 23));
}

// What all codes of a group have in common: code k in 1..511 stands for 2^(log_min + (k - 1) * step).
struct LogFmtScale {
    F32 log_min, step;
};

DEEP_EP_INLINE LogFmtScale logfmt_scale(LogFmtGroup group) {
    const F32 log_min = log2_of(splat(group.min));
    return {log_min, (log2_of(splat(group.max)) - log_min) / 510.0f};
}

struct LogFmtEncoder {
    LogFmtScale scale;
    F32 bias, half_min;
};

// Between codes k and k + 1 lie values v and v * r, r = 2^step. Their linear midpoint v * (1 + r) / 2 sits at
// log2((1 + r) / 2) / step of the way in log2, which is where a value starts to round up.
DEEP_EP_INLINE LogFmtEncoder logfmt_encoder(LogFmtGroup group) {
    const LogFmtScale scale = logfmt_scale(group);
    const F32 ratio = exp2_of(scale.step);
    const F32 midpoint = log2_of((ratio + 1.0f) * 0.5f) / scale.step;
    return {scale, 1.0f - midpoint, splat(group.min * 0.5f)};
}

// The ten bits of bf16 values; the sign is bit 9.
DEEP_EP_INLINE U32 logfmt_code(U32 bf16, const LogFmtEncoder& encoder) {
    const F32 magnitude = float_of((bf16 & 0x7FFFu) << 16);
    const F32 position = (log2_of(magnitude) - encoder.scale.log_min) / encoder.scale.step + encoder.bias;
    // Clamped before the conversion, so that zeros (whose logarithm means nothing here) stay in range.
    F32 bounded = position > 0.0f ? position : F32{};
    bounded = bounded < 510.0f ? bounded : splat(510.0f);
    const U32 code = unsigned_of(to_int(bounded)) + 1u;  // truncated: floor for positives
    const U32 kept = magnitude > encoder.half_min ? code : U32{};
    return kept | ((bf16 & 0x8000u) >> 6);
}

// What ten bits stand for, before it is rounded to bf16.
DEEP_EP_INLINE F32 logfmt_value(U32 word, const LogFmtScale& scale) {
    const U32 code = word & 0x1FFu;
    const F32 position = to_float(signed_of(code) - 1);
    const U32 magnitude = bits_of(exp2_of(scale.log_min + position * scale.step));
    const U32 kept = signed_of(code) > 0 ? magnitude : U32{};
    return float_of(kept | ((word & 0x200u) << 22));
}
