// Methods that Python calls in the path of a short operation. pybind11 spends about 1 us on a dozen integers, a third of what
// the launch behind them takes; here an integer costs a few nanoseconds.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

namespace deep_ep {
namespace fast_call {

namespace py = pybind11;

// What an argument becomes: a bool, an integer that is in range, or the object itself. False for anything else.
template <class T>
bool read(PyObject* value, T& result) {
    if constexpr (std::is_same_v<T, PyObject*>) {
        result = value;
        return true;
    } else if constexpr (std::is_same_v<T, bool>) {
        result = value == Py_True;
        return PyBool_Check(value);
    } else {
        static_assert(std::is_integral_v<T>);
        using Wide = std::conditional_t<std::is_unsigned_v<T>, unsigned long long, long long>;
        if (!PyLong_Check(value)) return false;
        Wide wide = 0;
        if constexpr (std::is_unsigned_v<T>) {
            wide = PyLong_AsUnsignedLongLong(value);
        } else {
            wide = PyLong_AsLongLong(value);
        }
        if (wide == static_cast<Wide>(-1) && PyErr_Occurred()) {
            PyErr_Clear();
            return false;
        }
        result = static_cast<T>(wide);
        return static_cast<Wide>(result) == wide;
    }
}

// Index of the first argument that is not what it should be, or their number.
template <class Values, size_t... Is>
size_t read_all(PyObject* const* arguments, Values& values, std::index_sequence<Is...>) {
    size_t good = 0;
    (void)((read(arguments[Is], std::get<Is>(values)) && (++good, true)) && ...);
    return good;
}

// The exception being handled becomes Python's as it does in any other call.
inline void raise_current() {
    const std::exception_ptr error = std::current_exception();
    try {
        py::cpp_function([error] { std::rethrow_exception(error); })();
    } catch (py::error_already_set& raised) {
        raised.restore();
    }
}

template <auto Function>
struct Method;

// A member function of integers, bools and borrowed objects, that returns nothing, an integer, or a new reference (null with
// an exception set).
template <class Owner, class Result, class... Args, Result (Owner::*Function)(Args...) const>
struct Method<Function> {
    static constexpr const char* kCapsule = "deep_ep.fast_call";
    static inline PyMethodDef definition{nullptr, nullptr, METH_FASTCALL, nullptr};

    static PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
        const auto* owner = static_cast<const Owner*>(PyCapsule_GetPointer(self, kCapsule));
        if (owner == nullptr) return nullptr;
        if (count != static_cast<Py_ssize_t>(sizeof...(Args))) {
            return PyErr_Format(PyExc_TypeError, "%s() takes %zu arguments but %zd were given",
                                definition.ml_name, sizeof...(Args), count);
        }
        std::tuple<Args...> values{};
        const size_t good = read_all(arguments, values, std::index_sequence_for<Args...>{});
        if (good != sizeof...(Args)) {
            return PyErr_Format(PyExc_TypeError, "%s() argument %zu is %R, of the wrong type or out of range",
                                definition.ml_name, good + 1, arguments[good]);
        }
        try {
            const auto run = [owner](Args... each) { return (owner->*Function)(each...); };
            if constexpr (std::is_void_v<Result>) {
                std::apply(run, values);
                Py_RETURN_NONE;
            } else if constexpr (std::is_same_v<Result, PyObject*>) {
                return std::apply(run, values);
            } else {
                return PyLong_FromLongLong(std::apply(run, values));
            }
        } catch (...) {
            raise_current();
            return nullptr;
        }
    }

    // The method of an object that pybind11 made, which lives as long as the method does.
    static py::object of(const py::object& self, const char* name) {
        const auto& owner = self.cast<const Owner&>();
        definition.ml_name = name;
        definition.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
        auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(
            const_cast<Owner*>(&owner), kCapsule,
            [](PyObject* ending) { Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(ending))); }));
        if (!capsule || PyCapsule_SetContext(capsule.ptr(), self.ptr()) != 0) throw py::error_already_set();
        self.inc_ref();
        auto method = py::reinterpret_steal<py::object>(PyCFunction_New(&definition, capsule.ptr()));
        if (!method) throw py::error_already_set();
        return method;
    }
};

}  // namespace fast_call

// Binds a member function as `name`. Looking it up makes an object each time: callers that care keep it.
template <auto Function, class Class>
Class& def_fast(Class& bound, const char* name) {
    bound.def_property_readonly(
        name, [name](const pybind11::object& self) { return fast_call::Method<Function>::of(self, name); });
    return bound;
}

}  // namespace deep_ep
