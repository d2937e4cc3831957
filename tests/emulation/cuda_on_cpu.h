// Runs CUDA kernels on the CPU, from their own source compiled as C++: a thread for each block, a fiber for each of its lanes.
// What is PTX in csrc/ptx is in include/ptx here. Slow, and bound to x86's order of memory, so a fence that is missing does not
// show; the logic of a kernel, its bits and what it waits for do.
//
// Included in front of every source file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulated {

constexpr int kWarpLanes = 32;

// A launch, and the one ahead of it in its stream.
struct Launch {
    std::shared_ptr<Launch> ahead;
    unsigned num_blocks = 0;
    std::atomic<unsigned> num_begun{0},
        num_ended{0};  // blocks that let the next launch start, or that are over

    bool has_ended() const { return num_ended == num_blocks && (ahead == nullptr || ahead->has_ended()); }
};

struct Stream {
    std::shared_ptr<Launch> last;
    std::vector<std::thread> blocks;

    void wait() {
        for (std::thread& block : blocks) block.join();
        blocks.clear();
        last.reset();
    }
};

struct Warp {
    // Of two collectives in turn: a lane may be in the next one while others still read the values of this one.
    uint64_t values[2][kWarpLanes];
    unsigned num_arrived = 0, generation = 0;
};

struct Lane {
    ucontext_t context;
    unsigned index;
    bool is_over = false;
    std::unique_ptr<char[]> stack;
};

struct Block {
    unsigned index, grid, threads;
    Launch* launch;
    std::function<void()> kernel;
    std::vector<uint32_t> dynamic_shared;
    std::vector<Lane> lanes;
    std::vector<Warp> warps;
    unsigned num_arrived = 0, generation = 0;
    bool all[2] = {true, true};  // of the votes of two barriers in turn
    bool has_begun = false;
    ucontext_t scheduler;
    Lane* running = nullptr;

    void let_next_begin() {
        if (!has_begun) ++launch->num_begun;
        has_begun = true;
    }
};

inline thread_local Block* block = nullptr;

inline unsigned lane_index() {
    return block->running->index;
}
inline unsigned lane_of_warp() {
    return lane_index() % kWarpLanes;
}

// In place of `extern __shared__`.
template <class T>
T* dynamic_shared() {
    return reinterpret_cast<T*>(block->dynamic_shared.data());
}

// Lets the other lanes of the block run.
inline void yield() {
    swapcontext(&block->running->context, &block->scheduler);
}

inline void run_lane() {
    block->kernel();
    block->running->is_over = true;
    swapcontext(&block->running->context, &block->scheduler);
}

inline void run_block(Block& self) {
    constexpr size_t kStackBytes = 96 << 10;
    block = &self;
    self.lanes.resize(self.threads);
    self.warps.resize((self.threads + kWarpLanes - 1) / kWarpLanes);
    for (unsigned i = 0; i < self.threads; ++i) {
        Lane& lane = self.lanes[i];
        lane.index = i;
        lane.stack = std::make_unique<char[]>(kStackBytes);
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.get();
        lane.context.uc_stack.ss_size = kStackBytes;
        lane.context.uc_link = nullptr;
        makecontext(&lane.context, run_lane, 0);
    }
    for (unsigned left = self.threads; left != 0;) {
        for (Lane& lane : self.lanes) {
            if (lane.is_over) continue;
            self.running = &lane;
            swapcontext(&self.scheduler, &lane.context);
            if (lane.is_over) --left;
        }
        std::this_thread::yield();
    }
    block = nullptr;
}

template <class Condition>
void sleep_until(const Condition& condition) {
    while (!condition()) std::this_thread::sleep_for(std::chrono::microseconds(20));
}

// starts_early: when all blocks of the launch ahead have let it, not when they are over.
inline void launch(Stream& stream, unsigned num_blocks, unsigned threads, size_t shared_bytes,
                   bool starts_early, const std::function<void()>& kernel) {
    auto self = std::make_shared<Launch>();
    self->ahead = stream.last;
    self->num_blocks = num_blocks;
    stream.last = self;
    for (unsigned i = 0; i < num_blocks; ++i) {
        stream.blocks.emplace_back([=] {
            Launch* const ahead = self->ahead.get();
            sleep_until([&] {
                return ahead == nullptr ||
                       (starts_early ? ahead->num_begun == ahead->num_blocks : ahead->has_ended());
            });
            Block of_launch{};
            of_launch.index = i, of_launch.grid = num_blocks, of_launch.threads = threads;
            of_launch.launch = self.get(), of_launch.kernel = kernel;
            of_launch.dynamic_shared.assign((shared_bytes + 3) / 4, 0xDEADBEEF);
            run_block(of_launch);
            of_launch.let_next_begin();
            ++self->num_ended;
        });
    }
}

// Puts a value of each lane in common, and returns those of all lanes of the warp.
template <class T>
const uint64_t* share(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Warp& warp = block->warps[lane_index() / kWarpLanes];
    const unsigned generation = warp.generation;
    uint64_t* values = warp.values[generation % 2];
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    values[lane_of_warp()] = bits;
    if (++warp.num_arrived == kWarpLanes) {
        warp.num_arrived = 0;
        ++warp.generation;
    } else {
        while (warp.generation == generation) yield();
    }
    return values;
}

template <class T>
T take(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class To, class From>
To cast_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline bool meet_block(bool vote) {
    const unsigned generation = block->generation;
    bool& all = block->all[generation % 2];
    all = all && vote;
    if (++block->num_arrived == block->threads) {
        block->num_arrived = 0;
        block->all[(generation + 1) % 2] = true;
        ++block->generation;
    } else {
        while (block->generation == generation) yield();
    }
    return all;
}

// Of threadIdx and its like: x as it is for the lane that asks.
template <unsigned (*kGet)()>
struct Index {
    struct X {
        operator unsigned() const { return kGet(); }
    } x;
};

// Both 16-bit halves of two words by themselves.
template <class Operation>
unsigned by_halves(unsigned a, unsigned b, const Operation& operation) {
    const unsigned low = operation(a & 0xFFFF, b & 0xFFFF), high = operation(a >> 16, b >> 16);
    return (low & 0xFFFF) | high << 16;
}

}  // namespace emulated

inline unsigned emulated_block() {
    return emulated::block->index;
}
inline unsigned emulated_grid() {
    return emulated::block->grid;
}
inline unsigned emulated_threads() {
    return emulated::block->threads;
}
inline emulated::Index<emulated::lane_index> threadIdx;
inline emulated::Index<emulated_block> blockIdx;
inline emulated::Index<emulated_grid> gridDim;
inline emulated::Index<emulated_threads> blockDim;

inline void __syncthreads() {
    emulated::meet_block(true);
}
inline int __syncthreads_and(int vote) {
    return emulated::meet_block(vote != 0);
}
inline void __syncwarp(unsigned = ~0u) {
    emulated::share(0);
}
inline unsigned __ballot_sync(unsigned, int vote) {
    const uint64_t* votes = emulated::share<int>(vote != 0);
    unsigned bits = 0;
    for (int i = 0; i < emulated::kWarpLanes; ++i) bits |= votes[i] != 0 ? 1u << i : 0u;
    return bits;
}
inline int __all_sync(unsigned mask, int vote) {
    return __ballot_sync(mask, vote) == ~0u;
}
inline int __any_sync(unsigned mask, int vote) {
    return __ballot_sync(mask, vote) != 0;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulated::take<T>(emulated::share(value)[lane % emulated::kWarpLanes]);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulated::take<T>(emulated::share(value)[emulated::lane_of_warp() ^ mask]);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
    const int lane = static_cast<int>(emulated::lane_of_warp());
    return emulated::take<T>(emulated::share(value)[lane >= by ? lane - by : lane]);
}
inline unsigned __match_any_sync(unsigned, int value) {
    const uint64_t* values = emulated::share(value);
    unsigned bits = 0;
    for (int i = 0; i < emulated::kWarpLanes; ++i)
        bits |= emulated::take<int>(values[i]) == value ? 1u << i : 0u;
    return bits;
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
    const uint64_t* values = emulated::share(value);
    unsigned bits = 0;
    for (int i = 0; i < emulated::kWarpLanes; ++i) bits |= static_cast<unsigned>(values[i]);
    return bits;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    const uint64_t* values = emulated::share(value);
    unsigned most = 0;
    for (int i = 0; i < emulated::kWarpLanes; ++i) most = std::max(most, static_cast<unsigned>(values[i]));
    return most;
}

inline int __popc(unsigned v) {
    return __builtin_popcount(v);
}
inline int __ffs(unsigned v) {
    return __builtin_ffs(static_cast<int>(v));
}
inline int __clz(unsigned v) {
    return v == 0 ? 32 : __builtin_clz(v);
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline uint32_t __float_as_uint(float v) {
    return emulated::cast_bits<uint32_t>(v);
}
inline float __uint_as_float(uint32_t v) {
    return emulated::cast_bits<float>(v);
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
    return emulated::by_halves(a, b, [](unsigned x, unsigned y) { return std::max(x, y); });
}
inline unsigned __vminu2(unsigned a, unsigned b) {
    return emulated::by_halves(a, b, [](unsigned x, unsigned y) { return std::min(x, y); });
}
inline unsigned __vsub2(unsigned a, unsigned b) {
    return emulated::by_halves(a, b, [](unsigned x, unsigned y) { return x - y; });
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned from = selector >> 4 * i & 7;
        result |= static_cast<unsigned>(bytes >> 8 * from & 0xFF) << 8 * i;
    }
    return result;
}

template <class T, class U>
T atomicAdd(T* p, U v) {
    return __atomic_fetch_add(p, static_cast<T>(v), __ATOMIC_SEQ_CST);
}
template <class T, class U>
T atomicOr(T* p, U v) {
    return __atomic_fetch_or(p, static_cast<T>(v), __ATOMIC_SEQ_CST);
}
template <class T, class U>
T atomicExch(T* p, U v) {
    return __atomic_exchange_n(p, static_cast<T>(v), __ATOMIC_SEQ_CST);
}
template <class T>
T atomicCAS(T* p, T expected, T wanted) {
    __atomic_compare_exchange_n(p, &expected, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
template <class T, class U>
T atomicMax(T* p, U v) {
    T seen = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (seen < static_cast<T>(v) && !__atomic_compare_exchange_n(p, &seen, static_cast<T>(v), false,
                                                                    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return seen;
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
    return a < b ? a : b;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
    return a > b ? a : b;
}
