// Tensors on the memory of another, by the C functions that torch has for code its compiler made, which need no headers of
// torch, and one C++ function by which Python gets them: less host time than torch's function for Python (csrc/README.md).
// Where a torch has not all of them, or makes something else by them, callers take that function.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace deep_ep {

class TensorViews {
  public:
    // A tensor to make views of, kept alive.
    using Base = std::shared_ptr<void>;

    // What this torch has; null if anything is missing.
    static const TensorViews* find();

    // Null if torch refuses.
    Base base(const pybind11::object& tensor) const;
    // Sizes and strides of the new one, and its offset in the storage, in elements. Null if torch refuses.
    pybind11::object view(const Base& base, const std::vector<int64_t>& sizes,
                          const std::vector<int64_t>& strides, int64_t offset) const;

  private:
    using Handle = void*;

    int (*reinterpret_)(Handle, int64_t, const int64_t*, const int64_t*, int64_t, Handle*) = nullptr;
    int (*delete_)(Handle) = nullptr;
    PyObject* (*wrap_)(const void*) = nullptr;
    PyObject* from_tensor_ = nullptr;  // kept for good
};

}  // namespace deep_ep
