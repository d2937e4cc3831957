#include "runtime/pool.h"

#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>

namespace deep_ep {

void BlockAllocator::add(int64_t offset, int64_t bytes) {
    const bool aligned = offset % kPoolAlignment == 0 && bytes % kPoolAlignment == 0;
    if (offset < 0 || bytes <= 0 || !aligned) {
        throw std::invalid_argument("deep_ep: a pool range of " + std::to_string(bytes) +
                                    " bytes at offset " + std::to_string(offset) +
                                    ": expected positive multiples of " + std::to_string(kPoolAlignment));
    }
    const auto next = by_offset_.lower_bound(offset);
    const bool overlaps_next = next != by_offset_.end() && next->first < offset + bytes;
    const bool overlaps_previous =
        next != by_offset_.begin() && std::prev(next)->first + std::prev(next)->second > offset;
    if (overlaps_next || overlaps_previous) {
        throw std::invalid_argument("deep_ep: the pool range at offset " + std::to_string(offset) +
                                    " overlaps one that the pool has already");
    }
    insert_free(offset, bytes);
}

int64_t BlockAllocator::allocate(int64_t bytes) {
    if (bytes > std::numeric_limits<int64_t>::max() - kPoolAlignment) return -1;
    const int64_t needed = bytes > 0 ? round_up(bytes, kPoolAlignment) : kPoolAlignment;
    const auto best = by_size_.lower_bound({needed, 0});
    if (best == by_size_.end()) return -1;
    const auto [block_bytes, offset] = *best;
    erase_free(by_offset_.find(offset));
    if (block_bytes > needed) insert_free(offset + needed, block_bytes - needed);
    used_.emplace(offset, needed);
    bytes_used_ += needed;
    return offset;
}

bool BlockAllocator::free(int64_t offset) {
    const auto block = used_.find(offset);
    if (block == used_.end()) return false;
    const int64_t bytes = block->second;
    used_.erase(block);
    bytes_used_ -= bytes;
    insert_free(offset, bytes);
    return true;
}

void BlockAllocator::insert_free(int64_t offset, int64_t bytes) {
    auto next = by_offset_.lower_bound(offset);
    if (next != by_offset_.begin()) {
        const auto previous = std::prev(next);
        if (previous->first + previous->second == offset) {
            offset = previous->first;
            bytes += previous->second;
            erase_free(previous);
        }
    }
    if (next != by_offset_.end() && next->first == offset + bytes) {
        bytes += next->second;
        erase_free(next);
    }
    by_offset_.emplace(offset, bytes);
    by_size_.emplace(bytes, offset);
    bytes_free_ += bytes;
}

void BlockAllocator::erase_free(std::map<int64_t, int64_t>::iterator block) {
    by_size_.erase({block->second, block->first});
    bytes_free_ -= block->second;
    by_offset_.erase(block);
}

}  // namespace deep_ep
