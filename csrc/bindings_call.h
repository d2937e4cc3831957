// Methods that Python calls in the path of a short operation. pybind11's casts of the arguments of such a launch, integers and
// tuples of them, cost up to 1.2 us, those here 0.2 to 0.4 us.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace deep_ep {
namespace fast_call {

namespace py = pybind11;

template <class T>
struct IsTuple : std::false_type {};
template <class... Ts>
struct IsTuple<std::tuple<Ts...>> : std::true_type {};
template <class T>
struct IsVector : std::false_type {};
template <class T>
struct IsVector<std::vector<T>> : std::true_type {};

template <class T>
bool read(PyObject* value, T& result);

template <class Values, size_t... Is>
bool read_items(PyObject* tuple, Values& values, std::index_sequence<Is...>) {
    return (read(PyTuple_GET_ITEM(tuple, Is), std::get<Is>(values)) && ...);
}

// What an argument becomes: a bool, an integer that is in range, a tuple or a list of these, or the object itself. False for
// anything else.
template <class T>
bool read(PyObject* value, T& result) {
    if constexpr (std::is_same_v<T, PyObject*>) {
        result = value;
        return true;
    } else if constexpr (IsTuple<T>::value) {
        constexpr size_t kSize = std::tuple_size_v<T>;
        return PyTuple_Check(value) && PyTuple_GET_SIZE(value) == static_cast<Py_ssize_t>(kSize) &&
               read_items(value, result, std::make_index_sequence<kSize>{});
    } else if constexpr (IsVector<T>::value) {
        if (!PyList_Check(value)) return false;
        result.resize(static_cast<size_t>(PyList_GET_SIZE(value)));
        for (size_t i = 0; i < result.size(); ++i) {
            if (!read(PyList_GET_ITEM(value, static_cast<Py_ssize_t>(i)), result[i])) return false;
        }
        return true;
    } else if constexpr (std::is_same_v<T, bool>) {
        result = value == Py_True;
        return PyBool_Check(value);
    } else {
        static_assert(std::is_integral_v<T>);
        using Wide = std::conditional_t<std::is_unsigned_v<T>, unsigned long long, long long>;
        if (!PyLong_Check(value)) {  // an integer of another library, perhaps
            if (!PyIndex_Check(value)) return false;
            const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value));
            if (number) return read(number.ptr(), result);
            PyErr_Clear();
            return false;
        }
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

// A TypeError that shows a number, and of anything else its type.
inline PyObject* wrong_argument(const char* method, size_t number, PyObject* value) {
    if (PyLong_Check(value)) {
        return PyErr_Format(PyExc_TypeError, "%s() argument %zu is %R, of the wrong type or out of range",
                            method, number, value);
    }
    return PyErr_Format(PyExc_TypeError, "%s() argument %zu is a %s, of the wrong type", method, number,
                        Py_TYPE(value)->tp_name);
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

// A method of Owner that takes integers, bools, tuples and lists of them, and borrowed objects, and returns nothing, a bool,
// an integer, or a new reference (null with an exception set).
template <auto Function, class Owner, class Result, class... Args>
struct MethodOf {
    static constexpr const char* kCapsule = "deep_ep.fast_call";
    static inline PyMethodDef definition{nullptr, nullptr, METH_FASTCALL, nullptr};

    static PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
        auto* owner = static_cast<Owner*>(PyCapsule_GetPointer(self, kCapsule));
        if (owner == nullptr) return nullptr;
        if (count != static_cast<Py_ssize_t>(sizeof...(Args))) {
            return PyErr_Format(PyExc_TypeError, "%s() takes %zu arguments but %zd were given",
                                definition.ml_name, sizeof...(Args), count);
        }
        try {
            std::tuple<std::decay_t<Args>...> values{};
            const size_t good = read_all(arguments, values, std::index_sequence_for<Args...>{});
            if (good != sizeof...(Args)) {
                return wrong_argument(definition.ml_name, good + 1, arguments[good]);
            }
            const auto run = [owner](const auto&... each) -> Result {
                return std::invoke(Function, *owner, each...);
            };
            if constexpr (std::is_void_v<Result>) {
                std::apply(run, values);
                Py_RETURN_NONE;
            } else if constexpr (std::is_same_v<Result, PyObject*>) {
                return std::apply(run, values);
            } else if constexpr (std::is_same_v<Result, bool>) {
                return PyBool_FromLong(std::apply(run, values));
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
        auto& owner = self.cast<Owner&>();
        definition.ml_name = name;
        definition.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
        auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(
            const_cast<std::remove_const_t<Owner>*>(&owner), kCapsule,
            [](PyObject* ending) { Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(ending))); }));
        if (!capsule || PyCapsule_SetContext(capsule.ptr(), self.ptr()) != 0) throw py::error_already_set();
        self.inc_ref();
        auto method = py::reinterpret_steal<py::object>(PyCFunction_New(&definition, capsule.ptr()));
        if (!method) throw py::error_already_set();
        return method;
    }
};

template <auto Function>
struct Method;

// A member function, or a function whose first argument is the object.
template <class Owner, class Result, class... Args, Result (Owner::*Function)(Args...) const>
struct Method<Function> : MethodOf<Function, const Owner, Result, Args...> {};
template <class Owner, class Result, class... Args, Result (Owner::*Function)(Args...)>
struct Method<Function> : MethodOf<Function, Owner, Result, Args...> {};
template <class Owner, class Result, class... Args, Result (*Function)(Owner&, Args...)>
struct Method<Function> : MethodOf<Function, Owner, Result, Args...> {};

}  // namespace fast_call

// A new reference; raises Python's exception in place of null.
inline pybind11::object owned(PyObject* result) {
    if (result == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(result);
}

// A new reference to None, of methods that return objects.
inline PyObject* none() {
    Py_RETURN_NONE;
}

// A new tuple of integers and of new references, which it takes; or null with an exception set.
template <class... Values>
PyObject* tuple_of(Values... values) {
    PyObject* result = PyTuple_New(sizeof...(Values));
    Py_ssize_t at = 0;
    bool is_complete = result != nullptr;
    const auto add = [&](auto value) {
        PyObject* item = nullptr;
        if constexpr (std::is_same_v<decltype(value), PyObject*>) {
            item = value;
        } else if constexpr (std::is_signed_v<decltype(value)>) {
            item = PyLong_FromLongLong(value);
        } else {
            item = PyLong_FromUnsignedLongLong(value);
        }
        is_complete = is_complete && item != nullptr;
        if (result == nullptr) {
            Py_XDECREF(item);
        } else {
            PyTuple_SET_ITEM(result, at++, item);
        }
    };
    (add(values), ...);
    if (is_complete) return result;
    Py_XDECREF(result);
    return nullptr;
}

// Binds a function of an object as `name`. Looking it up makes an object each time: callers that care keep it.
template <auto Function, class Class>
Class& def_fast(Class& bound, const char* name) {
    bound.def_property_readonly(
        name, [name](const pybind11::object& self) { return fast_call::Method<Function>::of(self, name); });
    return bound;
}

}  // namespace deep_ep
