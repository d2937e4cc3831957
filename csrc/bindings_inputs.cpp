// Whether the tensors of a dispatch or combine are as the kernels need them, like nearly all that come, and where they lie.
// Others are looked at one by one in deep_ep/checks.py and requests.py, which say what is wrong.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "bindings_call.h"
#include "bindings_tensors.h"

namespace py = pybind11;

namespace deep_ep {

void bind_inputs(py::module_& m);

namespace {

PyObject* none() {
    Py_RETURN_NONE;
}

// The parts of a handle that a repeated dispatch and a combine read.
struct HandleView {
    int64_t num_tokens, num_rows;
    uintptr_t rank_prefix, send_head;
};

std::optional<HandleView> read_handle(const TensorReader& reader, PyObject* handle, int64_t num_ranks) {
    if (!PyTuple_CheckExact(handle) || PyTuple_GET_SIZE(handle) != 6) return std::nullopt;
    TensorView prefix{}, src_idx{}, in_rank{}, head{};
    if (!reader.shaped(PyTuple_GET_ITEM(handle, 0), kInt32Type, {num_ranks, num_ranks}, prefix) ||
        !reader.view(PyTuple_GET_ITEM(handle, 3), src_idx) || src_idx.ndim != 1 ||
        !reader.view(PyTuple_GET_ITEM(handle, 4), in_rank) || in_rank.ndim != 2 ||
        !reader.dense(PyTuple_GET_ITEM(handle, 5), kInt32Type, 2, head) || head.shape[1] != num_ranks ||
        in_rank.shape[0] != head.shape[0] || in_rank.shape[1] != head.shape[1])
        return std::nullopt;
    return HandleView{head.shape[0], src_idx.shape[0], prefix.address(), head.address()};
}

// Those of dispatches of one kind of rows.
class DispatchInputs {
  public:
    // rows_type, scales_type: code and bits of DLPack. num_scales, num_topk: 0 without.
    DispatchInputs(const py::type& tensor_type, int device_index, int64_t num_ranks,
                   std::array<int, 2> rows_type, int64_t hidden, std::array<int, 2> scales_type,
                   int64_t num_scales, int64_t num_topk, bool topk_is_int64)
        : reader_(tensor_type, device_index),
          num_ranks_(num_ranks),
          rows_type_(type_of(rows_type)),
          hidden_(hidden),
          scales_type_(type_of(scales_type)),
          num_scales_(num_scales),
          num_topk_(num_topk),
          topk_type_(topk_is_int64 ? kInt64Type : kInt32Type) {}

    // (sent, layout, number of experts): what DispatchPlan::route takes. None if something is not as the kernels need it.
    PyObject* read(PyObject* x, PyObject* scales, PyObject* per_rank, PyObject* in_rank, PyObject* per_expert,
                   PyObject* topk_idx, PyObject* topk_weights) const {
        TensorView rows{}, scale{}, ranks{}, flags{}, experts{}, idx{}, weights{};
        if (!read_rows(x, scales, rows, scale)) return none();
        const int64_t num_tokens = rows.shape[0];
        if (!(num_topk_ == 0
                  ? topk_idx == Py_None && topk_weights == Py_None
                  : reader_.shaped(topk_idx, topk_type_, {num_tokens, num_topk_}, idx) &&
                        reader_.shaped(topk_weights, kFloat32Type, {num_tokens, num_topk_}, weights)) ||
            !reader_.shaped(per_rank, kInt32Type, {num_ranks_}, ranks) ||
            !reader_.shaped(in_rank, kBoolType, {num_tokens, num_ranks_}, flags) ||
            !reader_.dense(per_expert, kInt32Type, 1, experts) || experts.shape[0] == 0)
            return none();
        return tuple_of(sent(rows, scale, idx.address(), weights.address()),
                        tuple_of(experts.address(), flags.address()), experts.shape[0]);
    }

    // (sent, number of rows, send_head): what a dispatch by a handle takes. None likewise.
    PyObject* read_again(PyObject* x, PyObject* scales, PyObject* handle) const {
        TensorView rows{}, scale{};
        if (!read_rows(x, scales, rows, scale)) return none();
        const auto known = read_handle(reader_, handle, num_ranks_);
        if (!known || known->num_tokens != rows.shape[0]) return none();
        return tuple_of(sent(rows, scale, 0, 0), known->num_rows, known->send_head);
    }

  private:
    static TensorType type_of(const std::array<int, 2>& type) {
        return {static_cast<uint8_t>(type[0]), static_cast<uint8_t>(type[1])};
    }

    bool read_rows(PyObject* x, PyObject* scales, TensorView& rows, TensorView& scale) const {
        if (!reader_.dense(x, rows_type_, 2, rows) || rows.shape[1] != hidden_ ||
            rows.address() % TensorReader::kAlignment != 0)
            return false;
        if (num_scales_ == 0) return scales == Py_None;
        return reader_.typed(scales, scales_type_, 2, scale) && scale.strides != nullptr &&
               scale.shape[0] == rows.shape[0] && scale.shape[1] == num_scales_;
    }

    static PyObject* sent(const TensorView& rows, const TensorView& scale, uintptr_t idx, uintptr_t weights) {
        const bool has_scales = scale.ndim == 2;
        return tuple_of(
            rows.shape[0], rows.address(), scale.address(),
            tuple_of(has_scales ? scale.strides[0] : int64_t{0}, has_scales ? scale.strides[1] : int64_t{0}),
            idx, weights);
    }

    TensorReader reader_;
    int64_t num_ranks_;
    TensorType rows_type_;
    int64_t hidden_;
    TensorType scales_type_;
    int64_t num_scales_, num_topk_;
    TensorType topk_type_;
};

// Those of combines without a bias.
class CombineInputs {
  public:
    CombineInputs(const py::type& tensor_type, int device_index, int64_t num_ranks)
        : reader_(tensor_type, device_index), num_ranks_(num_ranks) {}

    // (number of rows, hidden, number of tokens, number of weights of a row, x, weights, rank_prefix, send_head): sizes,
    // then addresses; without weights 0. None if something is not as the kernels need it.
    PyObject* read(PyObject* x, PyObject* handle, PyObject* topk_weights) const {
        TensorView rows{}, weights{};
        if (!reader_.dense(x, kBf16Type, 2, rows) && !reader_.dense(x, kFloat16Type, 2, rows) &&
            !reader_.dense(x, kFloat32Type, 2, rows))
            return none();
        if (rows.address() % TensorReader::kAlignment != 0) return none();
        const int64_t row_bytes = rows.shape[1] * (rows.type_bits / 8);
        const auto known = read_handle(reader_, handle, num_ranks_);
        if (!known || known->num_rows != rows.shape[0] || row_bytes == 0 ||
            row_bytes % static_cast<int64_t>(TensorReader::kAlignment) != 0)
            return none();
        int64_t num_topk = 0;
        if (topk_weights != Py_None) {
            if (!reader_.dense(topk_weights, kFloat32Type, 2, weights) ||
                weights.shape[0] != known->num_rows || weights.address() % TensorReader::kAlignment != 0)
                return none();
            num_topk = weights.shape[1];
        }
        return tuple_of(known->num_rows, rows.shape[1], known->num_tokens, num_topk, rows.address(),
                        weights.address(), known->rank_prefix, known->send_head);
    }

  private:
    TensorReader reader_;
    int64_t num_ranks_;
};

}  // namespace

void bind_inputs(py::module_& m) {
    py::class_<DispatchInputs> dispatch(m, "DispatchInputs");
    dispatch.def(py::init<const py::type&, int, int64_t, std::array<int, 2>, int64_t, std::array<int, 2>,
                          int64_t, int64_t, bool>());
    def_fast<&DispatchInputs::read>(dispatch, "read");
    def_fast<&DispatchInputs::read_again>(dispatch, "read_again");
    py::class_<CombineInputs> combine(m, "CombineInputs");
    combine.def(py::init<const py::type&, int, int64_t>());
    def_fast<&CombineInputs::read>(combine, "read");
}

}  // namespace deep_ep
