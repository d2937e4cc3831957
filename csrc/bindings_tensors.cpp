#include "bindings_tensors.h"

#include <algorithm>

namespace py = pybind11;

namespace deep_ep {
namespace {

static_assert(sizeof(TensorView) == 48, "as in dlpack.h");

// DLPackExchangeAPI, the table behind the capsule.
struct ExchangeHeader {
    uint32_t major;
    uint32_t minor;
    const ExchangeHeader* older;
};
struct ExchangeTable {
    ExchangeHeader header;
    void* allocate;
    void* from_object;
    void* to_object;
    int (*view_object)(void* object, TensorView* result);
    void* current_stream;
};

}  // namespace

TensorReader::TensorReader(const py::type& type, int index)
    : type_(type),
      device_type_(index < 0 ? TensorView::kCpu : TensorView::kCuda),
      device_id_(std::max(index, 0)) {
    constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
    if (!py::hasattr(type, kAttribute)) return;
    const py::object capsule = type.attr(kAttribute);
    constexpr const char* kName = "dlpack_exchange_api";
    if (PyCapsule_IsValid(capsule.ptr(), kName) == 0) return;
    const auto* header = static_cast<const ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), kName));
    while (header != nullptr && header->major != 1) header = header->older;
    if (header != nullptr) read_ = reinterpret_cast<const ExchangeTable*>(header)->view_object;
}

bool TensorReader::view(PyObject* object, TensorView& result) const {
    if (read_ == nullptr || reinterpret_cast<PyObject*>(Py_TYPE(object)) != type_.ptr()) return false;
    if (read_(object, &result) != 0) {
        PyErr_Clear();
        return false;
    }
    return true;
}

bool TensorReader::typed(PyObject* object, TensorType type, int32_t ndim, TensorView& result) const {
    return view(object, result) && result.device_type == device_type_ && result.device_id == device_id_ &&
           result.type_code == type.code && result.type_bits == type.bits && result.type_lanes == 1 &&
           result.ndim == ndim;
}

bool TensorReader::laid_out(PyObject* object, TensorType type, const std::vector<int64_t>& shape,
                            const std::vector<int64_t>& strides, TensorView& result) const {
    if (!typed(object, type, static_cast<int32_t>(shape.size()), result) ||
        !std::equal(shape.begin(), shape.end(), result.shape) || result.address() % kAlignment != 0)
        return false;
    // Without strides it is contiguous, which its caller finds out in detail.
    bool is_alike = result.strides != nullptr;
    for (size_t i = 0; is_alike && i < shape.size(); ++i) {
        is_alike = shape[i] == 1 || strides[i] == result.strides[i];
    }
    return is_alike;
}

bool TensorReader::dense(PyObject* object, TensorType type, int32_t ndim, TensorView& result) const {
    return typed(object, type, ndim, result) && result.is_contiguous();
}

bool TensorReader::shaped(PyObject* object, TensorType type, std::initializer_list<int64_t> shape,
                          TensorView& result) const {
    return dense(object, type, static_cast<int32_t>(shape.size()), result) &&
           std::equal(shape.begin(), shape.end(), result.shape);
}

bool TensorReader::plain(PyObject* object, TensorType type, std::initializer_list<int64_t> shape,
                         TensorView& result) const {
    return shaped(object, type, shape, result) && result.address() % kAlignment == 0;
}

bool TensorReader::optional(PyObject* object, TensorType type, std::initializer_list<int64_t> shape,
                            uintptr_t& address) const {
    address = 0;
    if (object == Py_None) return true;
    TensorView view{};
    if (!plain(object, type, shape, view)) return false;
    address = view.address();
    return true;
}

}  // namespace deep_ep
