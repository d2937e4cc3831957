// Low-latency calls of one shape, from the tensors that are passed to those that come back, in one native call: whether they
// are like those of a call before, and where they lie; the order of streams; new outputs; the launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings_call.h"
#include "bindings_low_latency_operations.h"
#include "bindings_tensors.h"
#include "bindings_views.h"

namespace py = pybind11;

namespace deep_ep {

void bind_low_latency_calls(py::module_& m);

namespace {

using Address = uintptr_t;

constexpr int kWhole = 0, kSend = 1;  // LowLatencyPart of kernels/low_latency_launch.h

// Slabs of memory, each for one stream, whose parts are given out one after the other. A slab lives as long as what was cut
// from it.
template <class Slab>
class Slabs {
  public:
    explicit Slabs(int num_parts) : num_parts_(num_parts) {}

    // A slab, and the number of the part. captured: into a graph, whose replays write again to what the capture took, so that is
    // a slab of its own. make: of so many parts.
    template <class Make>
    std::pair<Slab, int> take(Address stream, bool captured, const Make& make) {
        if (captured) return {make(1), 0};
        auto found = find(stream);
        if (found == slabs_.end() || found->next == num_parts_) {
            Slab made = make(num_parts_);
            found = find(stream);  // anew, since Python ran
            if (found != slabs_.end()) {
                *found = {stream, std::move(made), 0};
            } else {
                if (slabs_.size() >= kMaxStreams) slabs_.erase(slabs_.begin());
                found = slabs_.insert(slabs_.end(), {stream, std::move(made), 0});
            }
        }
        return {found->slab, found->next++};
    }

  private:
    static constexpr size_t kMaxStreams = 4;

    struct OfStream {
        Address stream;
        Slab slab;
        int next;
    };
    typename std::vector<OfStream>::iterator find(Address stream) {
        return std::find_if(slabs_.begin(), slabs_.end(),
                            [&](const OfStream& each) { return each.stream == stream; });
    }

    int num_parts_;
    std::vector<OfStream> slabs_;
};

// The small outputs of dispatches of one shape, cut from slabs of memory.
class LowLatencyHandles {
  public:
    // make_slab: called with a number of parts, gives their address, and for recv_count and the two tensors of a handle one
    // each that covers the slab. view: called with one of these, and sizes, strides and offset in its elements. layouts: of the
    // three, sizes, strides, offset in the first part, and elements of a part. attribute: of the handle's first tensor, set to
    // (shape, address of the part). numbers: what ends a handle.
    LowLatencyHandles(py::object make_slab, py::object view, int num_parts, int64_t part_bytes,
                      const py::list& layouts, py::object shape, py::str attribute, py::tuple numbers)
        : make_slab_(std::move(make_slab)),
          view_(std::move(view)),
          slabs_(num_parts),
          part_bytes_(part_bytes),
          shape_(std::move(shape)),
          attribute_(std::move(attribute)),
          numbers_(std::move(numbers)) {
        if (layouts.size() != kTensors || numbers_.size() != 3)
            throw py::value_error("expected three layouts and numbers");
        for (size_t i = 0; i < kTensors; ++i) {
            const auto layout = layouts[i].cast<py::tuple>();
            layouts_[i] = {layout[0],
                           layout[1],
                           layout[2].cast<int64_t>(),
                           layout[3].cast<int64_t>(),
                           layout[0].cast<std::vector<int64_t>>(),
                           layout[1].cast<std::vector<int64_t>>()};
        }
    }

    // What belongs to the next dispatch, with any contents: recv_count, the handle, and the address of its part.
    struct Taken {
        py::object count, handle;
        Address address;
    };
    Taken take(Address stream, bool captured) {
        const auto [slab, part] =
            slabs_.take(stream, captured, [this](int num_parts) { return make(num_parts); });
        return cut(slab, part);
    }

  private:
    static constexpr size_t kTensors = 3;

    struct Layout {
        py::object sizes, strides;
        int64_t offset, step;
        std::vector<int64_t> native_sizes, native_strides;
    };
    struct Slab {
        Address address;
        py::object tensors[kTensors];
        TensorViews::Base bases[kTensors];  // of these tensors, null where views are made by `view_`
    };

    Slab make(int num_parts) const {
        const auto made = make_slab_(num_parts).cast<py::tuple>();
        Slab slab{made[0].cast<Address>(), {made[1], made[2], made[3]}, {}};
        const TensorViews* views = TensorViews::find();
        for (size_t i = 0; views != nullptr && i < kTensors; ++i) {
            // Trusted once it has made what `view_` makes.
            slab.bases[i] = views->base(slab.tensors[i]);
            if (slab.bases[i] == nullptr || !is_same(cut_one(slab, i, 0), view_of(slab, i, 0)))
                slab.bases[i] = nullptr;
        }
        return slab;
    }
    static bool is_same(const py::object& made, const py::object& wanted) {
        if (!made || Py_TYPE(made.ptr()) != Py_TYPE(wanted.ptr())) return false;
        for (const char* what : {"dtype", "device", "shape", "requires_grad"}) {
            if (!made.attr(what).equal(wanted.attr(what))) return false;
        }
        for (const char* what : {"stride", "data_ptr"}) {
            if (!made.attr(what)().equal(wanted.attr(what)())) return false;
        }
        return true;
    }
    // Of part 0 or another, by either way; the first may be null.
    py::object cut_one(const Slab& slab, size_t i, int part) const {
        if (slab.bases[i] == nullptr) return {};
        const Layout& layout = layouts_[i];
        return TensorViews::find()->view(slab.bases[i], layout.native_sizes, layout.native_strides,
                                         layout.offset + part * layout.step);
    }
    py::object view_of(const Slab& slab, size_t i, int part) const {
        const Layout& layout = layouts_[i];
        const py::object offset = owned(PyLong_FromLongLong(layout.offset + part * layout.step));
        PyObject* const arguments[] = {slab.tensors[i].ptr(), layout.sizes.ptr(), layout.strides.ptr(),
                                       offset.ptr()};
        return owned(PyObject_Vectorcall(view_.ptr(), arguments, 4, nullptr));
    }
    Taken cut(const Slab& slab, int part) const {
        const Address address = slab.address + static_cast<Address>(part * part_bytes_);
        py::object views[kTensors];
        for (size_t i = 0; i < kTensors; ++i) {
            views[i] = cut_one(slab, i, part);
            if (!views[i]) views[i] = view_of(slab, i, part);
        }
        const py::object places = owned(tuple_of(Py_NewRef(shape_.ptr()), address));
        if (PyObject_SetAttr(views[1].ptr(), attribute_.ptr(), places.ptr()) != 0)
            throw py::error_already_set();
        const auto number = [&](int i) { return PyTuple_GET_ITEM(numbers_.ptr(), i); };
        return {std::move(views[0]),
                owned(PyTuple_Pack(5, views[1].ptr(), views[2].ptr(), number(0), number(1), number(2))),
                address};
    }

    py::object make_slab_, view_;
    Slabs<Slab> slabs_;
    int64_t part_bytes_;
    py::object shape_;
    py::str attribute_;
    py::tuple numbers_;
    Layout layouts_[kTensors];
};

// What is the same in dispatches and combines.
class Steps {
  public:
    // plan: whose attribute `entry` is the address of a LowLatencyEntry. region: see LowLatencyOperations::Launched. row_bytes:
    // of what travels for a token. dtype: that of a dispatch's rows, by name. new_tensor: takes sizes, strides and a dtype.
    Steps(const TensorReader& reader, const std::shared_ptr<LowLatencyOperations>& operations,
          LowLatencyOperations::Kind kind, py::object plan, py::object region, int64_t row_bytes,
          py::object dtype, py::object new_tensor)
        : reader_(reader),
          operations_(operations),
          kind_(kind),
          plan_(std::move(plan)),
          region_(std::move(region)),
          row_bytes_(row_bytes),
          dtype_(std::move(dtype)),
          new_tensor_(std::move(new_tensor)),
          entry_(reinterpret_cast<const LowLatencyEntry*>(plan_.attr("entry").cast<Address>())) {}

    struct Begun {
        std::shared_ptr<LowLatencyOperations> operations;
        Address stream;
        bool captured, is_failed;
    };
    // is_failed: kernels have reported a failure; then nothing has been done.
    Begun begin() const {
        std::shared_ptr<LowLatencyOperations> operations = operations_.lock();
        if (operations == nullptr) throw py::value_error("the buffer's low-latency operations are gone");
        const Address stream = operations->stream();
        const int state = entry_->begin(entry_->plan, stream);
        if (state > 0) region_.attr("lease")();
        return {std::move(operations), stream, state > 0, state < 0};
    }
    // layout: a tuple of what new_tensor takes.
    py::object make(const py::object& layout, Address& address) const {
        py::object tensor = owned(PyObject_Call(new_tensor_.ptr(), layout.ptr(), nullptr));
        TensorView view{};
        address =
            reader_.view(tensor.ptr(), view) ? view.address() : tensor.attr("data_ptr")().cast<Address>();
        return tensor;
    }
    template <class Arguments>
    void launch(const Arguments& arguments, const Begun& begun, bool with_hook) const {
        entry_->launch(entry_->plan, &arguments, with_hook ? kSend : kWhole, begun.operations->num_blocks(),
                       begun.stream, begun.captured);
        begun.operations->count(kind_, arguments.num_tokens, row_bytes_, dtype_.ptr());
    }
    // kept: what must live until the hook was called.
    template <class Arguments>
    py::object hook(const Arguments& arguments, const Begun& begun, py::object kept) const {
        return begun.operations->hook(
            kind_, {entry_, plan_, region_, &arguments, sizeof(arguments), begun.stream}, std::move(kept));
    }

  private:
    const TensorReader& reader_;
    std::weak_ptr<LowLatencyOperations> operations_;  // which knows these calls, and would live for ever
    LowLatencyOperations::Kind kind_;
    py::object plan_, region_;
    int64_t row_bytes_;
    py::object dtype_, new_tensor_;
    const LowLatencyEntry* entry_;
};

// A tensor that dispatches return: how a new one is made, and what one that the caller gives is like.
struct Received {
    Received(const TensorReader& reader, const py::object& new_tensor, const py::tuple& layout)
        : arguments(layout),
          sizes(layout[0].cast<std::vector<int64_t>>()),
          strides(layout[1].cast<std::vector<int64_t>>()) {
        // Of a torch that does not tell it given tensors are left to the detailed checks: no element has 0 bits.
        const py::object empty = new_tensor(py::make_tuple(0), py::make_tuple(1), layout[2]);
        TensorView view{};
        if (reader.view(empty.ptr(), view)) type = {view.type_code, view.type_bits};
    }

    py::tuple arguments;  // for new_tensor
    std::vector<int64_t> sizes, strides;
    TensorType type{};
};

class LowLatencyDispatchCalls {
  public:
    // x, topk_idx, topk_weights, num_tokens, recv_stats, wait_stats, and of the tensors to write to rows and scales: addresses,
    // 0 for None.
    using Inputs = std::tuple<Address, Address, Address, int64_t, Address, Address, Address, Address>;

    // handles: kept alive by the caller. rows, scales: for new_tensor, the latter None for bf16 rows.
    LowLatencyDispatchCalls(const std::shared_ptr<LowLatencyOperations>& operations,
                            const py::type& tensor_type, int device_index, int64_t num_max_tokens,
                            int64_t hidden, int64_t num_topk, bool topk_is_int64, bool with_weights,
                            int64_t num_local, int64_t num_ranks, py::object plan, py::object region,
                            int64_t row_bytes, py::object dtype, const py::object& new_tensor,
                            LowLatencyHandles& handles, const py::tuple& rows, const py::object& scales)
        : reader_(tensor_type, device_index),
          num_max_tokens_(num_max_tokens),
          hidden_(hidden),
          num_topk_(num_topk),
          topk_type_(topk_is_int64 ? kInt64Type : kInt32Type),
          with_weights_(with_weights),
          num_local_(num_local),
          num_ranks_(num_ranks),
          steps_(reader_, operations, LowLatencyOperations::kDispatch, std::move(plan), std::move(region),
                 row_bytes, std::move(dtype), new_tensor),
          handles_(handles) {
        received_.emplace_back(reader_, new_tensor, rows);
        if (!scales.is_none()) received_.emplace_back(reader_, new_tensor, scales.cast<py::tuple>());
    }

    LowLatencyDispatchCalls(const LowLatencyDispatchCalls&) = delete;
    LowLatencyDispatchCalls& operator=(const LowLatencyDispatchCalls&) = delete;

    // `run` for tensors as they come. None also if something is not as the kernel needs it.
    PyObject* try_run(PyObject* x, PyObject* topk_idx, PyObject* topk_weights, PyObject* recv_stats,
                      PyObject* wait_stats, PyObject* out, bool with_hook) const {
        TensorView rows{}, idx{}, weights{};
        Address recv_at = 0, wait_at = 0, out_at[2]{};
        if (!reader_.dense(topk_idx, topk_type_, 2, idx) || idx.shape[1] != num_topk_) return none();
        const int64_t num_tokens = idx.shape[0];
        if (num_tokens > num_max_tokens_ || !reader_.plain(x, kBf16Type, {num_tokens, hidden_}, rows) ||
            !(with_weights_ ? reader_.plain(topk_weights, kFloat32Type, {num_tokens, num_topk_}, weights)
                            : topk_weights == Py_None) ||
            !reader_.optional(recv_stats, kInt32Type, {num_local_}, recv_at) ||
            !reader_.optional(wait_stats, kInt64Type, {num_ranks_}, wait_at) || !read_out(out, out_at))
            return none();
        return run({rows.address(), idx.address(), weights.address(), num_tokens, recv_at, wait_at, out_at[0],
                    out_at[1]},
                   out, with_hook, recv_stats, wait_stats);
    }

    // out: what is returned as recv_x, whose addresses are in `inputs`; None: new tensors. recv_stats, wait_stats: those whose
    // addresses are there, or None.
    // recv_x, recv_count, handle, event, hook or None. None after a failure that kernels have reported; nothing has been done
    // then.
    PyObject* run(const Inputs& inputs, PyObject* out, bool with_hook, PyObject* recv_stats,
                  PyObject* wait_stats) const {
        const Steps::Begun begun = steps_.begin();
        if (begun.is_failed) return none();
        LowLatencyDispatchArguments call{};
        std::tie(call.x, call.topk_idx, call.topk_weights, call.num_tokens, call.recv_stats, call.wait_stats,
                 call.rows, call.scales) = inputs;
        py::object received = py::reinterpret_borrow<py::object>(out);
        if (out == Py_None) received = steps_.make(received_[0].arguments, call.rows);
        if (out == Py_None && received_.size() == 2) {
            const py::object scales = steps_.make(received_[1].arguments, call.scales);
            received = owned(PyTuple_Pack(2, received.ptr(), scales.ptr()));
        }
        const LowLatencyHandles::Taken small = handles_.take(begun.stream, begun.captured);
        call.small = small.address;
        steps_.launch(call, begun, with_hook);
        py::object hook = py::none();
        if (with_hook) {
            // The outputs and what is added to must outlive the send.
            hook = steps_.hook(call, begun,
                               owned(PyTuple_Pack(5, received.ptr(), small.count.ptr(), small.handle.ptr(),
                                                  recv_stats, wait_stats)));
        }
        return PyTuple_Pack(5, received.ptr(), small.count.ptr(), small.handle.ptr(),
                            begun.operations->new_event().ptr(), hook.ptr());
    }

  private:
    // Addresses of rows and scales that the caller gives, 0 without. False if they are not like those of a dispatch.
    bool read_out(PyObject* out, Address (&addresses)[2]) const {
        if (out == Py_None) return true;
        const bool is_pair = received_.size() == 2;
        if (is_pair && (!PyTuple_CheckExact(out) || PyTuple_GET_SIZE(out) != 2)) return false;
        for (size_t i = 0; i < received_.size(); ++i) {
            const Received& wanted = received_[i];
            PyObject* given = is_pair ? PyTuple_GET_ITEM(out, static_cast<Py_ssize_t>(i)) : out;
            TensorView view{};
            if (!reader_.laid_out(given, wanted.type, wanted.sizes, wanted.strides, view)) return false;
            addresses[i] = view.address();
        }
        return true;
    }

    TensorReader reader_;
    int64_t num_max_tokens_, hidden_, num_topk_;
    TensorType topk_type_;
    bool with_weights_;
    int64_t num_local_, num_ranks_;
    Steps steps_;
    LowLatencyHandles& handles_;
    std::vector<Received> received_;  // rows, and scales of FP8 ones
};

class LowLatencyCombineCalls {
  public:
    // x, src_info, layout_range, source_tokens, positions, weights, topk_idx, topk_weights, num_tokens, out, wait_stats: as in
    // LowLatencyCombineArguments.
    using Inputs = std::tuple<Address, Address, Address, Address, Address, Address, Address, Address, int64_t,
                              Address, Address>;

    // num_groups, capacity: of the rows [L, R * M, H], by source [R, M, H]. places: where src_info, source_tokens, positions
    // and weights lie in the block of a handle, the last -1 where they are not used. out: strides and dtype for new_tensor.
    // ticket_dtype: of 8 bytes.
    LowLatencyCombineCalls(const std::shared_ptr<LowLatencyOperations>& operations,
                           const py::type& tensor_type, int device_index, int64_t num_groups,
                           int64_t capacity, int64_t hidden, int64_t num_max_tokens, int64_t num_topk,
                           bool topk_is_int64, bool expert_major, int64_t num_ranks, const py::tuple& places,
                           py::object plan, py::object region, int64_t row_bytes, py::object new_tensor,
                           const py::tuple& out, py::object ticket_dtype)
        : reader_(tensor_type, device_index),
          num_groups_(num_groups),
          capacity_(capacity),
          hidden_(hidden),
          num_max_tokens_(num_max_tokens),
          num_topk_(num_topk),
          topk_type_(topk_is_int64 ? kInt64Type : kInt32Type),
          expert_major_(expert_major),
          num_ranks_(num_ranks),
          src_info_at_(places[0].cast<Address>()),
          source_tokens_at_(places[1].cast<Address>()),
          positions_at_(places[2].cast<Address>()),
          weights_at_(places[3].cast<int64_t>()),
          steps_(reader_, operations, LowLatencyOperations::kCombine, std::move(plan), std::move(region),
                 row_bytes, py::none(), std::move(new_tensor)),
          out_strides_(out[0]),
          out_dtype_(out[1]),
          ticket_dtype_(std::move(ticket_dtype)),
          tickets_(kTicketsOfSlab) {}

    LowLatencyCombineCalls(const LowLatencyCombineCalls&) = delete;
    LowLatencyCombineCalls& operator=(const LowLatencyCombineCalls&) = delete;

    // `run` for tensors as they come. block: of the handle. out: None for a new one. None also if something is not as the
    // kernel needs it, or src_info or layout_range is not that of the block but a copy.
    PyObject* try_run(PyObject* x, PyObject* src_info, PyObject* layout_range, PyObject* topk_idx,
                      PyObject* topk_weights, PyObject* out, PyObject* wait_stats, bool with_hook,
                      Address block) {
        TensorView rows{}, idx{}, weights{}, info{}, ranges{};
        Address out_at = 0, wait_at = 0;
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
        const Address weights_at = weights_at_ < 0 ? 0 : block + static_cast<Address>(weights_at_);
        const auto kept =
            with_hook
                ? owned(PyTuple_Pack(7, x, src_info, layout_range, topk_idx, topk_weights, out, wait_stats))
                : py::none();
        return run({rows.address(), info.address(), ranges.address(), block + source_tokens_at_,
                    block + positions_at_, weights_at, idx.address(), weights.address(), num_tokens, out_at,
                    wait_at},
                   out, with_hook, kept.ptr());
    }

    // out: the tensor whose address is in `inputs`; None: a new one. kept: what must live until the hook was called.
    // Combined tokens, event, hook or None. None after a failure that kernels have reported; nothing has been done then.
    PyObject* run(const Inputs& inputs, PyObject* out, bool with_hook, PyObject* kept) {
        const Steps::Begun begun = steps_.begin();
        if (begun.is_failed) return none();
        LowLatencyCombineArguments call{};
        std::tie(call.x, call.src_info, call.layout_range, call.source_tokens, call.positions, call.weights,
                 call.topk_idx, call.topk_weights, call.num_tokens, call.out, call.wait_stats) = inputs;
        py::object target = py::reinterpret_borrow<py::object>(out);
        if (out == Py_None) {
            const py::object sizes = owned(tuple_of(call.num_tokens, hidden_));
            target = steps_.make(owned(PyTuple_Pack(3, sizes.ptr(), out_strides_.ptr(), out_dtype_.ptr())),
                                 call.out);
        }
        py::object ticket = py::none(), hook = py::none();
        if (with_hook) {
            const auto [slab, number] = tickets_.take(begun.stream, begun.captured,
                                                      [this](int count) { return make_tickets(count); });
            call.ticket = slab.address + static_cast<Address>(number) * kTicketBytes;
            ticket = slab.tensor;
        }
        steps_.launch(call, begun, with_hook);
        if (with_hook)
            hook = steps_.hook(call, begun, owned(PyTuple_Pack(3, target.ptr(), ticket.ptr(), kept)));
        return PyTuple_Pack(3, target.ptr(), begun.operations->new_event().ptr(), hook.ptr());
    }

  private:
    // What sending parts leave to receiving ones.
    struct Tickets {
        py::object tensor;
        Address address;
    };
    static constexpr int kTicketsOfSlab = 512, kTicketBytes = 128;  // a line each

    Tickets make_tickets(int count) const {
        Tickets made{};
        made.tensor = steps_.make(
            py::make_tuple(py::make_tuple(count * kTicketBytes / 8), py::make_tuple(1), ticket_dtype_),
            made.address);
        return made;
    }

    TensorReader reader_;
    int64_t num_groups_, capacity_, hidden_, num_max_tokens_, num_topk_;
    TensorType topk_type_;
    bool expert_major_;
    int64_t num_ranks_;
    Address src_info_at_, source_tokens_at_, positions_at_;
    int64_t weights_at_;
    Steps steps_;
    py::object out_strides_, out_dtype_, ticket_dtype_;
    Slabs<Tickets> tickets_;
};

}  // namespace

void bind_low_latency_calls(py::module_& m) {
    using Object = py::object;
    py::class_<LowLatencyHandles> handles(m, "LowLatencyHandles");
    handles.def(py::init<Object, Object, int, int64_t, const py::list&, Object, py::str, py::tuple>())
        .def("take", [](LowLatencyHandles& self, Address stream, bool captured) {
            const LowLatencyHandles::Taken taken = self.take(stream, captured);
            return py::make_tuple(taken.count, taken.handle, taken.address);
        });
    using Operations = const std::shared_ptr<LowLatencyOperations>&;
    py::class_<LowLatencyDispatchCalls> dispatch(m, "LowLatencyDispatchCalls");
    dispatch.def(py::init<Operations, const py::type&, int, int64_t, int64_t, int64_t, bool, bool, int64_t,
                          int64_t, Object, Object, int64_t, Object, const Object&, LowLatencyHandles&,
                          const py::tuple&, const Object&>(),
                 py::keep_alive<1, 17>());
    def_fast<&LowLatencyDispatchCalls::try_run>(dispatch, "try_run");
    def_fast<&LowLatencyDispatchCalls::run>(dispatch, "run");
    py::class_<LowLatencyCombineCalls> combine(m, "LowLatencyCombineCalls");
    combine.def(
        py::init<Operations, const py::type&, int, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool,
                 int64_t, const py::tuple&, Object, Object, int64_t, Object, const py::tuple&, Object>());
    def_fast<&LowLatencyCombineCalls::try_run>(combine, "try_run");
    def_fast<&LowLatencyCombineCalls::run>(combine, "run");
}

}  // namespace deep_ep
