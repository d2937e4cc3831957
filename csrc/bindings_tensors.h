// What kernels need to know of a torch tensor, through the C functions of DLPack that torch.Tensor carries: a stable binary
// interface without torch's headers. All of it costs less than one attribute of the tensor does in Python.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace deep_ep {

// dlpack.h, major version 1. Shape and strides, in elements, belong to the tensor.
struct TensorView {
    enum Device : int32_t { kCpu = 1, kCuda = 2 };

    void* data;
    int32_t device_type;
    int32_t device_id;
    int32_t ndim;
    uint8_t type_code;
    uint8_t type_bits;
    uint16_t type_lanes;
    const int64_t* shape;
    const int64_t* strides;
    uint64_t byte_offset;

    uintptr_t address() const { return reinterpret_cast<uintptr_t>(data) + byte_offset; }
    bool is_contiguous() const {
        int64_t expected = 1;
        bool is_dense = true;
        for (int32_t i = ndim; i-- > 0;) {
            if (shape[i] == 0) return true;
            if (shape[i] != 1 && strides != nullptr) is_dense = is_dense && strides[i] == expected;
            expected *= shape[i];
        }
        return is_dense;
    }
};

// An element type as DLPack names it.
struct TensorType {
    uint8_t code;
    uint8_t bits;
};

constexpr TensorType kInt32Type{0, 32}, kInt64Type{0, 64}, kFloat16Type{2, 16}, kFloat32Type{2, 32};
constexpr TensorType kBf16Type{4, 16}, kBoolType{6, 8};

// Reads tensors of one type, torch.Tensor itself and not what is derived from it, on one device.
class TensorReader {
  public:
    // What bulk copies and vector loads need of an address.
    static constexpr uintptr_t kAlignment = 16;

    // index: of the CUDA device, -1 for the CPU. A type without the functions is taken too: then no tensor is readable.
    TensorReader(const pybind11::type& type, int index);

    // False, and no exception, for anything that is no such tensor.
    bool view(PyObject* object, TensorView& result) const;
    // One of this element type and number of dimensions on the device, of any strides.
    bool typed(PyObject* object, TensorType type, int32_t ndim, TensorView& result) const;
    // One of this shape and these strides, in elements, at a multiple of 16 bytes.
    bool laid_out(PyObject* object, TensorType type, const std::vector<int64_t>& shape,
                  const std::vector<int64_t>& strides, TensorView& result) const;
    // A contiguous one.
    bool dense(PyObject* object, TensorType type, int32_t ndim, TensorView& result) const;
    // A dense one of this shape, at a multiple of 16 bytes.
    bool plain(PyObject* object, TensorType type, std::initializer_list<int64_t> shape,
               TensorView& result) const;
    // A dense one of this shape, at any address.
    bool shaped(PyObject* object, TensorType type, std::initializer_list<int64_t> shape,
                TensorView& result) const;
    // As `plain`, or None, whose address is 0.
    bool optional(PyObject* object, TensorType type, std::initializer_list<int64_t> shape,
                  uintptr_t& address) const;

  private:
    pybind11::type type_;
    int32_t device_type_;
    int32_t device_id_;
    int (*read_)(void*, TensorView*) = nullptr;
};

}  // namespace deep_ep
