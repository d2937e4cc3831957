#include "runtime/parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

namespace deep_ep {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kMinBytesPerThread = 192 * 1024;  // about 20 us of copying, twice what a wake-up costs
constexpr int kRangesPerThread = 4;                 // evens out threads that lose their core for a while

int default_num_threads() {
    int allowed = 1;
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        allowed = std::max(CPU_COUNT(&set), 1);
    } else {
        allowed = std::max<int>(std::thread::hardware_concurrency(), 1);
    }
    if (const char* text = std::getenv("OMP_NUM_THREADS")) {
        // "4,2" names nested levels; the first number is the one that concerns an outer loop.
        const long wanted = std::strtol(text, nullptr, 10);
        if (wanted > 0) return static_cast<int>(std::min<long>(wanted, kMaxThreads));
    }
    return std::min(allowed, kMaxThreads);
}

struct Job {
    RangeFunction function;
    void* context;
    int64_t num_items;
    int64_t range_items;
    std::atomic<int64_t> next{0};

    void work() {
        for (;;) {
            const int64_t begin = next.fetch_add(range_items, std::memory_order_relaxed);
            if (begin >= num_items) return;
            function(context, begin, std::min(begin + range_items, num_items));
        }
    }
};

class Pool {
  public:
    // Runs `job` on up to `threads` threads. False if another thread is using the pool: the caller runs it alone.
    bool run(Job& job, int threads) {
        std::unique_lock<std::mutex> in_use(in_use_, std::try_to_lock);
        if (!in_use.owns_lock()) return false;
        grow(threads - 1);
        const int helpers = std::min(threads - 1, num_workers_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            helpers_ = pending_ = helpers;
            ++generation_;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [&] { return pending_ == 0; });
        return true;
    }

  private:
    void grow(int workers) {
        // Workers take no signals: Python's handlers belong to the main thread.
        sigset_t all, before;
        sigfillset(&all);
        if (num_workers_ >= workers || pthread_sigmask(SIG_SETMASK, &all, &before) != 0) return;
        try {
            for (; num_workers_ < workers; ++num_workers_) {
                std::thread([this, index = num_workers_, seen = generation_] {
                    serve(index, seen);
                }).detach();
            }
        } catch (const std::system_error&) {
            // No more threads to be had: fewer share the work.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void serve(int index, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= helpers_) continue;
            Job* job = job_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--pending_ == 0) done_.notify_one();
        }
    }

    std::mutex in_use_, mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    uint64_t generation_ = 0;
    int helpers_ = 0, pending_ = 0, num_workers_ = 0;
};

std::atomic<Pool*> pool_pointer{nullptr};
std::atomic<int> thread_count{0};

// A forked child has none of the parent's workers and perhaps a locked mutex: it drops the pool (a small leak) and
// makes its own at first use.
void forget_pool() {
    pool_pointer.store(nullptr, std::memory_order_relaxed);
}

Pool& pool() {
    Pool* current = pool_pointer.load(std::memory_order_acquire);
    if (current == nullptr) {
        static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
        (void)registered;
        Pool* fresh = new Pool;  // never destroyed: workers may outlive static destructors
        if (pool_pointer.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return *fresh;
        delete fresh;
    }
    return *current;
}

}  // namespace

int num_threads() {
    int count = thread_count.load(std::memory_order_relaxed);
    if (count == 0) {
        count = default_num_threads();
        thread_count.store(count, std::memory_order_relaxed);
    }
    return count;
}

void set_num_threads(int count) {
    thread_count.store(std::min(std::max(count, 1), kMaxThreads), std::memory_order_relaxed);
}

void parallel_ranges(int64_t num_items, int64_t bytes_per_item, RangeFunction function, void* context) {
    if (num_items <= 0) return;
    const int64_t by_size = num_items * std::max<int64_t>(bytes_per_item, 1) / kMinBytesPerThread;
    const int64_t threads = std::min({static_cast<int64_t>(num_threads()), num_items, by_size});
    if (threads > 1) {
        const int64_t range_items = std::max<int64_t>(num_items / (threads * kRangesPerThread), 1);
        Job job{function, context, num_items, range_items};
        if (pool().run(job, static_cast<int>(threads))) return;
    }
    function(context, 0, num_items);
}

}  // namespace deep_ep
