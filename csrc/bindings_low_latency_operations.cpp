#include "bindings_low_latency_operations.h"

#include <algorithm>
#include <cstring>

#include "bindings_call.h"

namespace py = pybind11;

namespace deep_ep {

void bind_low_latency_operations(py::module_& m);

namespace {

constexpr int kReceive = 2;  // LowLatencyPart of kernels/low_latency_launch.h

template <class... Objects>
PyObject* call(const py::object& function, Objects... arguments) {
    PyObject* given[] = {nullptr, arguments...};  // the first is the callee's to use
    return PyObject_Vectorcall(function.ptr(), given + 1,
                               sizeof...(arguments) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
}

// A number that is an int and in range.
bool is_number(PyObject* value, int64_t wanted) {
    int overflow = 0;
    return PyLong_CheckExact(value) && PyLong_AsLongLongAndOverflow(value, &overflow) == wanted &&
           overflow == 0;
}

bool is_flag(PyObject* value, bool wanted) {
    return value == (wanted ? Py_True : Py_False);
}

}  // namespace

// The lock, for as long as the object lives.
class LowLatencyOperations::Held {
  public:
    explicit Held(const LowLatencyOperations& self) : self_(self) { owned(call(self.acquire_)); }
    ~Held() {
        PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
        PyErr_Fetch(&type, &value, &traceback);
        Py_XDECREF(call(self_.release_));
        PyErr_Restore(type, value, traceback);
    }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

  private:
    const LowLatencyOperations& self_;
};

struct LowLatencyOperations::Hook {
    static constexpr const char* kCapsule = "deep_ep.receive_hook";

    std::shared_ptr<LowLatencyOperations> operations;
    const LowLatencyEntry* entry;
    py::object plan, region, kept;
    Kind kind;
    int64_t number;
    uintptr_t stream;
    alignas(8) unsigned char arguments[128];
    bool is_pending;
};

LowLatencyOperations::LowLatencyOperations(const py::object& lock, py::object kernels, int device_index,
                                           py::object current_device, py::object current_stream,
                                           const py::object& traffic, py::type event, py::object use_device,
                                           py::object raise_failure, py::object raise_closed, py::str places)
    : acquire_(lock.attr("acquire")),
      release_(lock.attr("release")),
      kernels_(std::move(kernels)),
      launches_(kernels_.attr("launches")),
      device_index_(device_index),
      current_device_(std::move(current_device)),
      current_stream_(std::move(current_stream)),
      add_dispatch_(traffic.attr("add_dispatch")),
      add_combine_(traffic.attr("add_combine")),
      event_(std::move(event)),
      use_device_(std::move(use_device)),
      raise_failure_(std::move(raise_failure)),
      raise_closed_(std::move(raise_closed)),
      names_{py::str("low_latency_dispatch"), py::str("low_latency_combine")},
      failure_name_("failure"),
      max_blocks_name_("max_blocks"),
      places_name_(std::move(places)) {
    if (!PyDict_Check(launches_.ptr())) throw py::type_error("launches is no dict");
}

void LowLatencyOperations::add_dispatch(int64_t num_max_tokens, int64_t num_experts, bool use_fp8,
                                        bool round_scale, bool use_ue8m0, bool with_weights,
                                        bool expert_major, py::object try_run) {
    dispatches_.push_back({num_max_tokens, num_experts, use_fp8, round_scale, use_ue8m0, with_weights,
                           expert_major, std::move(try_run)});
}

void LowLatencyOperations::add_combine(py::object shape, bool sum_at_home, bool use_logfmt,
                                       py::object try_run) {
    py::object numbers = shape.attr("numbers");
    if (!PyTuple_CheckExact(numbers.ptr()) || PyTuple_GET_SIZE(numbers.ptr()) != 3)
        throw py::type_error("expected three numbers of a shape");
    combines_.push_back({std::move(shape), std::move(numbers), sum_at_home, use_logfmt, std::move(try_run)});
}

void LowLatencyOperations::forget_calls() {
    dispatches_.clear();
    combines_.clear();
}

PyObject* LowLatencyOperations::try_dispatch(PyObject* x, PyObject* topk_idx, PyObject* topk_weights,
                                             PyObject* num_max_tokens, PyObject* num_experts,
                                             PyObject* recv_stats, PyObject* wait_stats, PyObject* out,
                                             PyObject* use_fp8, PyObject* round_scale, PyObject* use_ue8m0,
                                             PyObject* expert_major, PyObject* with_hook) {
    const Held held(*this);
    if (!is_current_device() || has_failed() || !has_room(kDispatch) || !PyBool_Check(with_hook))
        return none();
    // By number, since what is called may add to them.
    for (size_t i = 0; i < dispatches_.size(); ++i) {
        const DispatchCall& known = dispatches_[i];
        if (!is_number(num_max_tokens, known.num_max_tokens) || !is_number(num_experts, known.num_experts) ||
            known.with_weights != (topk_weights != Py_None) || !is_flag(use_fp8, known.use_fp8) ||
            !is_flag(round_scale, known.round_scale) || !is_flag(use_ue8m0, known.use_ue8m0) ||
            !is_flag(expert_major, known.expert_major))
            continue;
        const py::object try_run = known.try_run;
        PyObject* done = call(try_run, x, topk_idx, topk_weights, recv_stats, wait_stats, out, with_hook);
        if (done != Py_None) return done;
        Py_DECREF(done);
    }
    return none();
}

PyObject* LowLatencyOperations::try_combine(PyObject* x, PyObject* topk_idx, PyObject* topk_weights,
                                            PyObject* handle, PyObject* out, PyObject* wait_stats,
                                            PyObject* sum_at_home, PyObject* use_logfmt,
                                            PyObject* with_hook) {
    const Held held(*this);
    if (!is_current_device() || has_failed() || !has_room(kCombine) || !PyBool_Check(with_hook))
        return none();
    const bool is_tuple = PyTuple_Check(handle);
    if ((!is_tuple && !PyList_Check(handle)) || PySequence_Fast_GET_SIZE(handle) != 5) return none();
    PyObject** parts = PySequence_Fast_ITEMS(handle);
    const auto places = py::reinterpret_steal<py::object>(PyObject_GetAttr(parts[0], places_name_.ptr()));
    if (!places) {
        PyErr_Clear();
        return none();
    }
    if (!PyTuple_CheckExact(places.ptr()) || PyTuple_GET_SIZE(places.ptr()) != 2) return none();
    PyObject* shape = PyTuple_GET_ITEM(places.ptr(), 0);
    PyObject* block = PyTuple_GET_ITEM(places.ptr(), 1);
    for (size_t i = 0; i < combines_.size(); ++i) {
        const CombineCall& known = combines_[i];
        if (known.shape.ptr() != shape || !is_flag(sum_at_home, known.sum_at_home) ||
            !is_flag(use_logfmt, known.use_logfmt))
            continue;
        const py::object try_run = known.try_run, numbers = known.numbers;
        bool is_same = true;
        for (Py_ssize_t k = 0; is_same && k < 3; ++k) {
            const int equal =
                PyObject_RichCompareBool(parts[2 + k], PyTuple_GET_ITEM(numbers.ptr(), k), Py_EQ);
            if (equal < 0) PyErr_Clear();
            is_same = equal > 0;
        }
        if (!is_same) continue;
        PyObject* done =
            call(try_run, x, parts[0], parts[1], topk_idx, topk_weights, out, wait_stats, with_hook, block);
        if (done != Py_None) return done;
        Py_DECREF(done);
    }
    return none();
}

uintptr_t LowLatencyOperations::stream() const {
    uintptr_t address = 0;
    const py::object stream = owned(call(current_stream_));
    if (!fast_call::read(stream.ptr(), address)) throw py::type_error("the current stream is no address");
    return address;
}

int LowLatencyOperations::num_blocks() const {
    int number = 0;
    const py::object most = owned(PyObject_GetAttr(kernels_.ptr(), max_blocks_name_.ptr()));
    if (!fast_call::read(most.ptr(), number)) throw py::type_error("max_blocks is no number");
    return number;
}

void LowLatencyOperations::count_launch(Kind kind) {
    int64_t before = 0;
    PyObject* known = PyDict_GetItemWithError(launches_.ptr(), names_[kind].ptr());
    if (known != nullptr && !fast_call::read(known, before)) before = 0;
    if (known == nullptr && PyErr_Occurred()) throw py::error_already_set();
    const py::object now = owned(PyLong_FromLongLong(before + 1));
    if (PyDict_SetItem(launches_.ptr(), names_[kind].ptr(), now.ptr()) != 0) throw py::error_already_set();
}

void LowLatencyOperations::count(Kind kind, int64_t num_tokens, int64_t row_bytes, PyObject* dtype) {
    ++num_calls_[kind];
    count_launch(kind);
    const py::object tokens = owned(PyLong_FromLongLong(num_tokens));
    const py::object bytes = owned(PyLong_FromLongLong(row_bytes));
    owned(kind == kDispatch ? call(add_dispatch_, tokens.ptr(), bytes.ptr(), dtype)
                            : call(add_combine_, tokens.ptr(), bytes.ptr()));
}

py::object LowLatencyOperations::new_event() const {
    auto* type = reinterpret_cast<PyTypeObject*>(event_.ptr());
    return owned(type->tp_new(type, no_arguments_.ptr(), nullptr));
}

py::object LowLatencyOperations::hook(Kind kind, const Launched& sent, py::object kept) {
    static PyMethodDef definition{"receive_hook", &call_hook, METH_NOARGS,
                                  "Finishes a low-latency operation; calling it again does nothing."};
    auto made = std::make_unique<Hook>();
    if (sent.num_bytes > sizeof(made->arguments)) throw py::value_error("too many arguments for a hook");
    made->operations = shared_from_this();
    made->entry = sent.entry;
    made->plan = sent.plan;
    made->region = sent.region;
    made->kept = std::move(kept);
    made->kind = kind;
    made->number = num_calls_[kind];
    made->stream = sent.stream;
    std::memcpy(made->arguments, sent.arguments, sent.num_bytes);
    made->is_pending = true;
    const py::object capsule = owned(PyCapsule_New(made.get(), Hook::kCapsule, [](PyObject* ending) {
        delete static_cast<Hook*>(PyCapsule_GetPointer(ending, Hook::kCapsule));
    }));
    const Hook* hook = made.release();
    py::object function = owned(PyCFunction_New(&definition, capsule.ptr()));
    hook->region.attr("num_pending") = hook->region.attr("num_pending").cast<int64_t>() + 1;
    pending_[kind].push_back(hook->number);
    return function;
}

PyObject* LowLatencyOperations::call_hook(PyObject* capsule, PyObject*) {
    auto* hook = static_cast<Hook*>(PyCapsule_GetPointer(capsule, Hook::kCapsule));
    if (hook == nullptr) return nullptr;
    try {
        if (hook->is_pending) {
            hook->is_pending = false;
            const py::object kept = std::move(hook->kept);
            hook->operations->receive(*hook);
        }
    } catch (...) {
        fast_call::raise_current();
        return nullptr;
    }
    Py_RETURN_NONE;
}

void LowLatencyOperations::receive(Hook& hook) {
    const Held held(*this);
    if (is_closed_) owned(call(raise_closed_, names_[hook.kind].ptr()));
    std::vector<int64_t>& pending = pending_[hook.kind];
    if (std::find(pending.begin(), pending.end(), hook.number) == pending.end()) return;  // forgotten
    if (is_current_device()) {
        launch_receive(hook);
    } else {  // another one than in the thread that made the call
        const py::object context = use_device_();
        context.attr("__enter__")();
        try {
            launch_receive(hook);
        } catch (...) {
            context.attr("__exit__")(py::none(), py::none(), py::none());
            throw;
        }
        context.attr("__exit__")(py::none(), py::none(), py::none());
    }
    pending.erase(std::remove(pending.begin(), pending.end(), hook.number), pending.end());
    hook.region.attr("num_pending") = hook.region.attr("num_pending").cast<int64_t>() - 1;
}

void LowLatencyOperations::launch_receive(const Hook& hook) {
    const int state = has_failed() ? -1 : hook.entry->begin(hook.entry->plan, hook.stream);
    if (state < 0) {
        owned(call(raise_failure_, kernels_.ptr()));
        throw py::value_error("a failure that is not known");
    }
    if (state > 0) hook.region.attr("lease")();
    hook.entry->launch(hook.entry->plan, hook.arguments, kReceive, num_blocks(), hook.stream, state > 0);
    count_launch(hook.kind);
}

int64_t LowLatencyOperations::age(int kind) const {
    return pending_[kind].empty() ? 0 : num_calls_[kind] + 1 - pending_[kind].front();
}

void LowLatencyOperations::forget_pending() {
    for (auto& each : pending_) each.clear();
}

void LowLatencyOperations::close() {
    is_closed_ = true;
    forget_calls();
}

bool LowLatencyOperations::is_current_device() const {
    const py::object current = owned(call(current_device_));
    return is_number(current.ptr(), device_index_);
}

bool LowLatencyOperations::has_failed() const {
    return owned(PyObject_GetAttr(kernels_.ptr(), failure_name_.ptr())).ptr() != Py_None;
}

bool LowLatencyOperations::has_room(Kind kind) const {
    return num_pending() < kMaxPending && age(kind) < kSets;
}

void bind_low_latency_operations(py::module_& m) {
    using Object = py::object;
    py::class_<LowLatencyOperations, std::shared_ptr<LowLatencyOperations>> operations(
        m, "LowLatencyOperations");
    operations
        .def(py::init<const Object&, Object, int, Object, Object, const Object&, py::type, Object, Object,
                      Object, py::str>())
        .def("add_dispatch", &LowLatencyOperations::add_dispatch)
        .def("add_combine", &LowLatencyOperations::add_combine)
        .def("forget_calls", &LowLatencyOperations::forget_calls)
        .def_property_readonly("num_pending", &LowLatencyOperations::num_pending)
        .def("age", &LowLatencyOperations::age)
        .def("num_calls", &LowLatencyOperations::num_calls)
        .def("note_call", &LowLatencyOperations::note_call)
        .def("forget_pending", &LowLatencyOperations::forget_pending)
        .def("close", &LowLatencyOperations::close);
    def_fast<&LowLatencyOperations::try_dispatch>(operations, "try_dispatch");
    def_fast<&LowLatencyOperations::try_combine>(operations, "try_combine");
}

}  // namespace deep_ep
