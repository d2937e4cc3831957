#include "cpu/quantize.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/row_loops.h"
#include "runtime/parallel.h"

namespace deep_ep::cpu {
namespace {

// A row of scales where it lies: floats, or exponent bytes packed four to a word.
class ScaleRow {
  public:
    ScaleRow(void* base, int64_t row, int64_t row_stride, int64_t column_stride, bool packed)
        : words_(static_cast<uint32_t*>(base) + row * row_stride), stride_(column_stride), packed_(packed) {}

    void write(const float* scales, int64_t tiles) const {
        if (!packed_) {
            for (int64_t tile = 0; tile < tiles; ++tile)
                std::memcpy(words_ + tile * stride_, scales + tile, 4);
            return;
        }
        for (int64_t word = 0; word * kTilesPerWord < tiles; ++word) {
            uint32_t packed = 0;
            for (int64_t tile = word * kTilesPerWord; tile < std::min(tiles, (word + 1) * kTilesPerWord);
                 ++tile) {
                uint32_t bits;
                std::memcpy(&bits, scales + tile, 4);
                packed |= (bits >> 23) << (8 * (tile % kTilesPerWord));
            }
            words_[word * stride_] = packed;
        }
    }

    void read(float* scales, int64_t tiles) const {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            uint32_t bits;
            if (packed_) {
                const uint32_t word = words_[tile / kTilesPerWord * stride_];
                bits = ((word >> (8 * (tile % kTilesPerWord))) & 0xFFu) << 23;
            } else {
                bits = words_[tile * stride_];
            }
            std::memcpy(scales + tile, &bits, 4);
        }
    }

  private:
    uint32_t* words_;
    int64_t stride_;
    bool packed_;
};

}  // namespace

void quantize_rows(const QuantizeRows& args) {
    const auto quantize_row = row_loops().quantize_row[static_cast<int>(args.in)];
    const bool pow2 = args.format != ScaleFormat::kFp32;
    const int64_t tiles = num_tiles(args.channels);
    const int64_t x_bytes = element_bytes(args.in);
    parallel_for(args.num_rows, args.channels * (x_bytes + 1), [&](int64_t begin, int64_t end) {
        std::vector<float> scales(static_cast<size_t>(tiles));
        for (int64_t row = begin; row < end; ++row) {
            quantize_row(static_cast<const uint8_t*>(args.x) + row * args.x_stride * x_bytes, args.channels,
                         pow2, args.q + row * args.q_stride, scales.data());
            ScaleRow(args.scales, row, args.scales_row_stride, args.scales_column_stride,
                     args.format == ScaleFormat::kUe8m0)
                .write(scales.data(), tiles);
        }
    });
}

void dequantize_rows(const DequantizeRows& args) {
    const auto dequantize_row = row_loops().dequantize_row[static_cast<int>(args.out_type)];
    const int64_t tiles = num_tiles(args.channels);
    const int64_t out_bytes = element_bytes(args.out_type);
    parallel_for(args.num_rows, args.channels * (out_bytes + 1), [&](int64_t begin, int64_t end) {
        std::vector<float> scales(static_cast<size_t>(tiles));
        for (int64_t row = begin; row < end; ++row) {
            ScaleRow(const_cast<void*>(args.scales), row / args.scale_rows, args.scales_row_stride,
                     args.scales_column_stride, args.scales_packed)
                .read(scales.data(), tiles);
            dequantize_row(args.q + row * args.q_stride, args.channels, scales.data(),
                           static_cast<uint8_t*>(args.out) + row * args.out_stride * out_bytes);
        }
    });
}

void quantize_blocks(const QuantizeBlocks& args) {
    const auto quantize_block = row_loops().quantize_block[static_cast<int>(args.in)];
    const int64_t tiles = num_tiles(args.channels);
    const int64_t x_bytes = element_bytes(args.in);
    parallel_for(ceil_div(args.num_rows, kTile), kTile * args.channels * (x_bytes + 1),
                 [&](int64_t begin, int64_t end) {
                     for (int64_t block = begin; block < end; ++block) {
                         const int64_t row = block * kTile;
                         const int rows = static_cast<int>(std::min<int64_t>(kTile, args.num_rows - row));
                         for (int64_t tile = 0; tile < tiles; ++tile) {
                             const int64_t column = tile * kTile;
                             const int columns =
                                 static_cast<int>(std::min<int64_t>(kTile, args.channels - column));
                             const auto* x = static_cast<const uint8_t*>(args.x) +
                                             (row * args.x_stride + column) * x_bytes;
                             args.scales[block * tiles + tile] =
                                 quantize_block(x, args.x_stride, rows, columns, args.pow2,
                                                args.q + row * args.channels + column, args.channels);
                         }
                     }
                 });
}

void quantize_transposed(const QuantizeTransposed& args) {
    const auto quantize_tile = row_loops().quantize_transposed_tile[static_cast<int>(args.in)];
    const bool pow2 = args.format != ScaleFormat::kFp32;
    const int64_t tiles = num_tiles(args.num_tokens);
    const int64_t x_bytes = element_bytes(args.in);
    const int64_t strips = ceil_div(args.channels, kTransposeChannels);
    const int64_t strip_bytes = args.num_tokens * kTransposeChannels * (x_bytes + 1);
    parallel_for(strips, strip_bytes, [&](int64_t begin, int64_t end) {
        // [channel of the strip][tile], so that a channel's scales are contiguous when they are written out.
        std::vector<float> scales(static_cast<size_t>(kTransposeChannels * tiles));
        float tile_scales[kTransposeChannels];
        for (int64_t strip = begin; strip < end; ++strip) {
            const int64_t channel = strip * kTransposeChannels;
            const int channels =
                static_cast<int>(std::min<int64_t>(kTransposeChannels, args.channels - channel));
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t token = tile * kTile;
                const int tokens = static_cast<int>(std::min<int64_t>(kTile, args.num_tokens - token));
                const auto* x =
                    static_cast<const uint8_t*>(args.x) + (token * args.x_stride + channel) * x_bytes;
                quantize_tile({x, args.x_stride, tokens, channels, pow2,
                               args.q + channel * args.num_tokens + token, args.num_tokens, tile_scales});
                for (int c = 0; c < channels; ++c) scales[c * tiles + tile] = tile_scales[c];
            }
            for (int c = 0; c < channels; ++c) {
                ScaleRow(args.scales, channel + c, args.scales_row_stride, args.scales_column_stride,
                         args.format == ScaleFormat::kUe8m0)
                    .write(scales.data() + c * tiles, tiles);
            }
        }
    });
}

}  // namespace deep_ep::cpu
