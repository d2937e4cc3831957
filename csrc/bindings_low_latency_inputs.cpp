// Whether the tensors of a low-latency call are like those of one before, and where they lie.
#include <pybind11/pybind11.h>

#include "bindings_call.h"
#include "bindings_tensors.h"

namespace py = pybind11;

namespace deep_ep {

void bind_low_latency_inputs(py::module_& m);

namespace {

PyObject* none() {
    Py_RETURN_NONE;
}

// Those of dispatches of one shape.
class LowLatencyDispatchInputs {
  public:
    LowLatencyDispatchInputs(const py::type& tensor_type, int device_index, int64_t num_max_tokens,
                             int64_t hidden, int64_t num_topk, bool topk_is_int64, bool with_weights,
                             int64_t num_local, int64_t num_ranks)
        : reader_(tensor_type, device_index),
          num_max_tokens_(num_max_tokens),
          hidden_(hidden),
          num_topk_(num_topk),
          topk_type_(topk_is_int64 ? kInt64Type : kInt32Type),
          with_weights_(with_weights),
          num_local_(num_local),
          num_ranks_(num_ranks) {}

    // (x, topk_idx, topk_weights, num_tokens, recv_stats, wait_stats): addresses, 0 for None. None if something is not as
    // the kernel needs it.
    PyObject* read(PyObject* x, PyObject* topk_idx, PyObject* topk_weights, PyObject* recv_stats,
                   PyObject* wait_stats) const {
        TensorView rows{}, idx{}, weights{};
        uintptr_t recv_at = 0, wait_at = 0;
        if (!reader_.dense(topk_idx, topk_type_, 2, idx) || idx.shape[1] != num_topk_) return none();
        const int64_t num_tokens = idx.shape[0];
        if (num_tokens > num_max_tokens_ || !reader_.plain(x, kBf16Type, {num_tokens, hidden_}, rows) ||
            !(with_weights_ ? reader_.plain(topk_weights, kFloat32Type, {num_tokens, num_topk_}, weights)
                            : topk_weights == Py_None) ||
            !reader_.optional(recv_stats, kInt32Type, {num_local_}, recv_at) ||
            !reader_.optional(wait_stats, kInt64Type, {num_ranks_}, wait_at))
            return none();
        return tuple_of(rows.address(), idx.address(), weights.address(), num_tokens, recv_at, wait_at);
    }

  private:
    TensorReader reader_;
    int64_t num_max_tokens_, hidden_, num_topk_;
    TensorType topk_type_;
    bool with_weights_;
    int64_t num_local_, num_ranks_;
};

// Those of combines of one shape.
class LowLatencyCombineInputs {
  public:
    // num_groups, capacity: of the rows [L, R * M, H], by source [R, M, H]. src_info_at: where src_info lies in the block
    // of its handle.
    LowLatencyCombineInputs(const py::type& tensor_type, int device_index, int64_t num_groups,
                            int64_t capacity, int64_t hidden, int64_t num_max_tokens, int64_t num_topk,
                            bool topk_is_int64, bool expert_major, int64_t src_info_at, int64_t num_ranks)
        : reader_(tensor_type, device_index),
          num_groups_(num_groups),
          capacity_(capacity),
          hidden_(hidden),
          num_max_tokens_(num_max_tokens),
          num_topk_(num_topk),
          topk_type_(topk_is_int64 ? kInt64Type : kInt32Type),
          expert_major_(expert_major),
          src_info_at_(static_cast<uintptr_t>(src_info_at)),
          num_ranks_(num_ranks) {}

    // (x, src_info, layout_range, topk_idx, topk_weights, num_tokens, out, wait_stats): addresses, 0 for None and for the
    // weights of rows by source. None if something is not as the kernel needs it, or src_info or layout_range is not that
    // of the block but a copy.
    PyObject* read(PyObject* x, PyObject* src_info, PyObject* layout_range, PyObject* topk_idx,
                   PyObject* topk_weights, PyObject* out, PyObject* wait_stats, uintptr_t block) const {
        TensorView rows{}, idx{}, weights{}, info{}, ranges{};
        uintptr_t out_at = 0, wait_at = 0;
        if (!reader_.dense(topk_idx, topk_type_, 2, idx) || idx.shape[1] != num_topk_) return none();
        const int64_t num_tokens = idx.shape[0];
        if (num_tokens > num_max_tokens_ || !reader_.view(src_info, info) ||
            info.address() != block + src_info_at_ || !reader_.view(layout_range, ranges) ||
            !reader_.plain(x, kBf16Type, {num_groups_, capacity_, hidden_}, rows) ||
            !reader_.optional(out, kBf16Type, {num_tokens, hidden_}, out_at) ||
            !reader_.optional(wait_stats, kInt64Type, {num_ranks_}, wait_at))
            return none();
        if (expert_major_ &&
            (ranges.address() != block || !reader_.dense(topk_weights, kFloat32Type, 2, weights) ||
             weights.shape[0] != num_tokens || weights.shape[1] != num_topk_))
            return none();
        return tuple_of(rows.address(), info.address(), ranges.address(), idx.address(), weights.address(),
                        num_tokens, out_at, wait_at);
    }

  private:
    TensorReader reader_;
    int64_t num_groups_, capacity_, hidden_, num_max_tokens_, num_topk_;
    TensorType topk_type_;
    bool expert_major_;
    uintptr_t src_info_at_;
    int64_t num_ranks_;
};

}  // namespace

void bind_low_latency_inputs(py::module_& m) {
    py::class_<LowLatencyDispatchInputs> dispatch(m, "LowLatencyDispatchInputs");
    dispatch.def(py::init<const py::type&, int, int64_t, int64_t, int64_t, bool, bool, int64_t, int64_t>());
    def_fast<&LowLatencyDispatchInputs::read>(dispatch, "read");
    py::class_<LowLatencyCombineInputs> combine(m, "LowLatencyCombineInputs");
    combine.def(py::init<const py::type&, int, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool,
                         int64_t, int64_t>());
    def_fast<&LowLatencyCombineInputs::read>(combine, "read");
}

}  // namespace deep_ep
