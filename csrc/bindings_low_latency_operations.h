// The low-latency operations of a buffer, as far as it takes no kernel: calls that are like one before, operations that are
// outstanding, and their receive hooks. From what Buffer is called with to what it returns such a call is one native call.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "bindings_low_latency.h"

namespace deep_ep {

class LowLatencyOperations : public std::enable_shared_from_this<LowLatencyOperations> {
  public:
    enum Kind : int { kDispatch = 0, kCombine = 1 };  // LowLatencyKind of layout/low_latency_layout.h

    // What an operation was launched with, and on what.
    struct Launched {
        const LowLatencyEntry* entry;
        pybind11::object plan;    // keeps `entry`
        pybind11::object region;  // has `lease()` and `num_pending`
        const void* arguments;
        size_t num_bytes;
        uintptr_t stream;
    };

    // lock: that of the engine, held around everything that is not thread safe. kernels: has `failure`, None or what ends all
    // operations; `max_blocks`; and `launches`, a dict that kernels are counted in. device_index: of the buffer, -1 for the CPU.
    // current_device, current_stream: functions for the index, and the address, of those of the calling thread. traffic: has
    // add_dispatch and add_combine. event: a type, made without arguments and not initialised. use_device: makes a context of
    // the buffer's device. raise_failure: called with kernels; raise_closed: with the name of an operation. places: attribute of a
    // handle's first tensor, (shape, address of its block).
    LowLatencyOperations(const pybind11::object& lock, pybind11::object kernels, int device_index,
                         pybind11::object current_device, pybind11::object current_stream,
                         const pybind11::object& traffic, pybind11::type event, pybind11::object use_device,
                         pybind11::object raise_failure, pybind11::object raise_closed, pybind11::str places);
    LowLatencyOperations(const LowLatencyOperations&) = delete;
    LowLatencyOperations& operator=(const LowLatencyOperations&) = delete;

    // Calls like one before.

    // try_run: takes x, topk_idx, topk_weights, recv_stats, wait_stats, out and with_hook, and returns None if they are not as
    // it needs them.
    void add_dispatch(int64_t num_max_tokens, int64_t num_experts, bool use_fp8, bool round_scale,
                      bool use_ue8m0, bool with_weights, bool expert_major, pybind11::object try_run);
    // shape: that the handles of its dispatches carry, with `numbers`, what ends a handle. try_run: takes x, src_info,
    // layout_range, topk_idx, topk_weights, out, wait_stats, with_hook, and the address of the handle's block.
    void add_combine(pybind11::object shape, bool sum_at_home, bool use_logfmt, pybind11::object try_run);
    void forget_calls();

    // What Buffer returns, or None if something is new or wrong; then nothing has happened.
    PyObject* try_dispatch(PyObject* x, PyObject* topk_idx, PyObject* topk_weights, PyObject* num_max_tokens,
                           PyObject* num_experts, PyObject* recv_stats, PyObject* wait_stats, PyObject* out,
                           PyObject* use_fp8, PyObject* round_scale, PyObject* use_ue8m0,
                           PyObject* expert_major, PyObject* with_hook);
    PyObject* try_combine(PyObject* x, PyObject* topk_idx, PyObject* topk_weights, PyObject* handle,
                          PyObject* out, PyObject* wait_stats, PyObject* sum_at_home, PyObject* use_logfmt,
                          PyObject* with_hook);

    // Launches, with the lock held.

    uintptr_t stream() const;
    int num_blocks() const;
    // After a launch. dtype: of what a dispatch sent.
    void count(Kind kind, int64_t num_tokens, int64_t row_bytes, PyObject* dtype);
    // kept: what must live until the hook was called.
    pybind11::object hook(Kind kind, const Launched& sent, pybind11::object kept);
    pybind11::object new_event() const;

    // Outstanding operations.

    int num_pending() const { return static_cast<int>(pending_[0].size() + pending_[1].size()); }
    // How many calls ago, counting the next one, the oldest outstanding operation of a kind was; 0 if there is none.
    int64_t age(int kind) const;
    int64_t num_calls(int kind) const { return num_calls_[kind]; }
    // This rank took part in an operation in another way.
    void note_call(int kind) { ++num_calls_[kind]; }
    // Hooks that have not been called do nothing from now on.
    void forget_pending();
    // They raise.
    void close();

  private:
    struct Hook;
    class Held;
    struct DispatchCall {
        int64_t num_max_tokens, num_experts;
        bool use_fp8, round_scale, use_ue8m0, with_weights, expert_major;
        pybind11::object try_run;
    };
    struct CombineCall {
        pybind11::object shape, numbers;
        bool sum_at_home, use_logfmt;
        pybind11::object try_run;
    };
    // MAX_OUTSTANDING of deep_ep/engines/low_latency_call.py, and the sets of a region.
    static constexpr int kMaxPending = 2, kSets = 2;

    static PyObject* call_hook(PyObject* capsule, PyObject*);
    bool is_current_device() const;
    bool has_failed() const;
    bool has_room(Kind kind) const;
    void count_launch(Kind kind);
    void receive(Hook& hook);
    void launch_receive(const Hook& hook);

    pybind11::object acquire_, release_, kernels_, launches_;
    int device_index_;
    pybind11::object current_device_, current_stream_, add_dispatch_, add_combine_;
    pybind11::type event_;
    pybind11::object use_device_, raise_failure_, raise_closed_;
    pybind11::str names_[2], failure_name_, max_blocks_name_, places_name_;
    pybind11::tuple no_arguments_;

    std::vector<DispatchCall> dispatches_;
    std::vector<CombineCall> combines_;
    int64_t num_calls_[2]{};
    std::vector<int64_t> pending_[2];  // by number, in the order of the calls
    bool is_closed_ = false;
};

}  // namespace deep_ep
