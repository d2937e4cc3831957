#include "bindings_views.h"

#include <dlfcn.h>

namespace py = pybind11;

namespace deep_ep {
namespace {

// A function of a library that is loaded already; null if either is missing.
template <class Function>
void look_up(Function& function, const char* library, const char* name) {
    void* loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (loaded == nullptr) return;
    function = reinterpret_cast<Function>(dlsym(loaded, name));
    dlclose(loaded);
}

}  // namespace

const TensorViews* TensorViews::find() {
    static const TensorViews* const found = []() -> const TensorViews* {
        static TensorViews views;
        look_up(views.reinterpret_, "libtorch_cpu.so", "aoti_torch__reinterpret_tensor");
        look_up(views.delete_, "libtorch_cpu.so", "aoti_torch_delete_tensor_object");
        // PyObject* THPVariable_Wrap(const at::TensorBase&), a handle being the address of one.
        look_up(views.wrap_, "libtorch_python.so", "_Z16THPVariable_WrapRKN2at10TensorBaseE");
        if (views.reinterpret_ == nullptr || views.delete_ == nullptr || views.wrap_ == nullptr)
            return nullptr;
        try {
            const py::object function = py::module_::import("torch").attr("_C").attr("_aoti").attr(
                "unsafe_alloc_void_ptr_from_tensor");
            views.from_tensor_ = Py_NewRef(function.ptr());
        } catch (py::error_already_set&) {
            return nullptr;
        }
        return &views;
    }();
    return found;
}

TensorViews::Base TensorViews::base(const py::object& tensor) const {
    try {
        const auto capsule = py::handle(from_tensor_)(tensor);
        if (!PyCapsule_CheckExact(capsule.ptr())) return nullptr;
        Handle handle = PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr()));
        if (handle == nullptr) throw py::error_already_set();
        return Base(handle, [free = delete_](Handle each) { free(each); });
    } catch (py::error_already_set&) {
        return nullptr;
    }
}

py::object TensorViews::view(const Base& base, const std::vector<int64_t>& sizes,
                             const std::vector<int64_t>& strides, int64_t offset) const {
    Handle made = nullptr;
    const auto num_dims = static_cast<int64_t>(sizes.size());
    if (reinterpret_(base.get(), num_dims, sizes.data(), strides.data(), offset, &made) != 0) return {};
    PyObject* tensor = wrap_(made);
    delete_(made);
    if (tensor == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(tensor);
}

}  // namespace deep_ep
