// Which parts of an address range are in use: best fit over free blocks that merge with their neighbours. Arithmetic
// on offsets only, so that it is the same for device memory, for addresses without memory, and in tests.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <unordered_map>
#include <utility>

namespace deep_ep {

constexpr int64_t kPoolAlignment = 512;  // bytes; what torch's allocator rounds to as well

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Not thread safe: the owner of the memory holds a lock.
class BlockAllocator {
  public:
    // A new free range [offset, offset + bytes), which merges with a free block that ends there. Both are multiples of
    // kPoolAlignment, and ranges do not overlap; std::invalid_argument otherwise.
    void add(int64_t offset, int64_t bytes);
    // The offset of the smallest free block that holds `bytes` (the lowest of equal ones), or -1 when there is none.
    int64_t allocate(int64_t bytes);
    // False if no block in use starts at `offset`.
    bool free(int64_t offset);

    int64_t bytes_used() const { return bytes_used_; }
    int64_t bytes_free() const { return bytes_free_; }
    int64_t largest_free() const { return by_size_.empty() ? 0 : by_size_.rbegin()->first; }
    int64_t num_used() const { return static_cast<int64_t>(used_.size()); }

  private:
    void insert_free(int64_t offset, int64_t bytes);
    void erase_free(std::map<int64_t, int64_t>::iterator block);

    std::map<int64_t, int64_t> by_offset_;           // free blocks: offset -> bytes
    std::set<std::pair<int64_t, int64_t>> by_size_;  // the same blocks as (bytes, offset)
    std::unordered_map<int64_t, int64_t> used_;      // offset -> bytes
    int64_t bytes_used_ = 0, bytes_free_ = 0;
};

}  // namespace deep_ep
