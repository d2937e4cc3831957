// Calls of get_dispatch_layout, from the indices that are passed to the tensors that come back, in one native call: whether the
// indices are as the kernel needs them, the order of streams, memory, the launch, and the tensors.
#include "bindings_layout.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "bindings_call.h"
#include "bindings_tensors.h"

namespace py = pybind11;

namespace deep_ep {

void bind_layout(py::module_& m);

namespace {

using Address = uintptr_t;

py::object number(int64_t value) {
    return owned(PyLong_FromLongLong(value));
}

// One at a time.
class LayoutCalls {
  public:
    // queue: whose attribute `entry` is the address of a LayoutEntry. max_experts: that the kernel counts. make_slab: called
    // with a number of bytes, gives their address, an int32 tensor and a bool tensor that cover them. view: called with one of
    // these, and sizes, strides and offset in its elements.
    LayoutCalls(const py::type& tensor_type, int device_index, py::object queue, int64_t num_ranks,
                int64_t max_experts, py::object make_slab, py::object view)
        : reader_(tensor_type, device_index),
          queue_(std::move(queue)),
          entry_(reinterpret_cast<const LayoutEntry*>(queue_.attr("entry").cast<Address>())),
          num_ranks_(num_ranks),
          max_experts_(max_experts),
          make_slab_(std::move(make_slab)),
          view_(std::move(view)),
          unit_(py::make_tuple(1)) {}

    // `run` for indices as they come. None also if something is not as the kernel needs it.
    PyObject* try_run(PyObject* topk_idx, PyObject* num_experts, Address stream) {
        TensorView idx{};
        const bool is_int64 = reader_.dense(topk_idx, kInt64Type, 2, idx);
        if ((!is_int64 && !reader_.dense(topk_idx, kInt32Type, 2, idx)) || idx.shape[1] == 0 ||
            !PyLong_CheckExact(num_experts))
            return none();
        int overflow = 0;
        const int64_t experts = PyLong_AsLongLongAndOverflow(num_experts, &overflow);
        if (overflow != 0 || experts <= 0 || experts > max_experts_) return none();
        return run(idx.address(), is_int64, idx.shape[0], idx.shape[1], experts, stream);
    }

    // num_tokens_per_rank, num_tokens_per_expert and is_token_in_rank. None after a failure that kernels have reported;
    // nothing has been done then.
    PyObject* run(Address topk_idx, bool is_int64, int64_t num_tokens, int64_t num_topk, int64_t num_experts,
                  Address stream) {
        const Shape shape{num_tokens, num_experts};
        const int state = entry_->begin(entry_->owner, stream);
        if (state < 0) return none();
        const bool captured = state > 0;
        Tensors made{};
        if (!captured && next_.stream == stream && next_.shape == shape) {
            std::swap(made, next_);
        } else {
            made = make(shape, stream, captured);
        }
        const LayoutArguments arguments{topk_idx,
                                        is_int64,
                                        num_tokens,
                                        num_topk,
                                        num_experts,
                                        made.address,
                                        made.address + 4 * num_ranks_,
                                        made.address + flags_at(shape)};
        entry_->launch(entry_->owner, &arguments, stream, captured);
        if (!captured) {
            is_steady_ = last_.stream == stream && last_.shape == shape;
            last_ = {stream, shape};
        }
        return PyTuple_Pack(3, made.parts[0].ptr(), made.parts[1].ptr(), made.parts[2].ptr());
    }

    // Makes the tensors of a next call that is like the last two, for when the host would be waiting. stream: the current one,
    // on which memory is allocated.
    void prepare(Address stream) {
        if (is_steady_ && last_.stream == stream &&
            !(next_.stream == last_.stream && next_.shape == last_.shape))
            next_ = make(last_.shape, last_.stream, false);
    }

    // Lets go of all memory.
    void clear() {
        next_ = {};
        last_ = {};
        is_steady_ = false;
        slabs_.clear();
    }

  private:
    static constexpr int64_t kSlabBytes = 2 << 20, kLargestPart = kSlabBytes / 4, kAlignment = 128;
    static constexpr size_t kMaxStreams = 4;

    struct Shape {
        int64_t num_tokens, num_experts;  // no experts: of no call
        bool operator==(const Shape& other) const {
            return num_tokens == other.num_tokens && num_experts == other.num_experts;
        }
    };
    struct Call {
        Address stream;
        Shape shape;
    };
    struct Slab {
        Address stream, address;
        py::object int32, flags;
        int64_t used;
    };
    struct Tensors {
        Address stream, address;
        Shape shape;
        py::object parts[3];
    };

    static int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
    int64_t flags_at(const Shape& shape) const { return aligned(4 * (num_ranks_ + shape.num_experts)); }

    Tensors make(const Shape& shape, Address stream, bool captured) {
        const int64_t flags = flags_at(shape), bytes = aligned(flags + shape.num_tokens * num_ranks_);
        // While a graph is captured each call has memory of its own: a replay writes again to what the capture took, where
        // the rest of a slab would meanwhile belong to others.
        if (captured || bytes > kLargestPart) return cut(new_slab(stream, bytes), 0, flags, shape);
        auto slab = find(stream);
        if (slab == slabs_.end() || slab->used + bytes > kSlabBytes) {
            Slab made = new_slab(stream, kSlabBytes);
            slab = find(stream);  // anew, since Python ran
            if (slab != slabs_.end()) {
                *slab = std::move(made);
            } else {
                if (slabs_.size() >= kMaxStreams) slabs_.erase(slabs_.begin());
                slab = slabs_.insert(slabs_.end(), std::move(made));
            }
        }
        const int64_t start = slab->used;
        slab->used += bytes;
        return cut(Slab(*slab), start, flags, shape);
    }
    Slab new_slab(Address stream, int64_t bytes) const {
        const auto made = make_slab_(bytes).cast<py::tuple>();
        return {stream, made[0].cast<Address>(), made[1], made[2], 0};
    }
    std::vector<Slab>::iterator find(Address stream) {
        return std::find_if(slabs_.begin(), slabs_.end(),
                            [&](const Slab& each) { return each.stream == stream; });
    }
    Tensors cut(const Slab& slab, int64_t start, int64_t flags, const Shape& shape) const {
        const auto ranks = number(num_ranks_);
        const auto per_rank = owned(PyTuple_Pack(1, ranks.ptr()));
        const auto per_expert = owned(PyTuple_Pack(1, number(shape.num_experts).ptr()));
        const auto in_rank = owned(PyTuple_Pack(2, number(shape.num_tokens).ptr(), ranks.ptr()));
        const auto by_token = owned(PyTuple_Pack(2, ranks.ptr(), unit_[0].ptr()));
        return {slab.stream,
                slab.address + static_cast<Address>(start),
                shape,
                {view(slab.int32, per_rank, unit_, start / 4),
                 view(slab.int32, per_expert, unit_, start / 4 + num_ranks_),
                 view(slab.flags, in_rank, by_token, start + flags)}};
    }
    py::object view(const py::object& slab, const py::object& sizes, const py::object& strides,
                    int64_t offset) const {
        const auto at = number(offset);
        PyObject* const arguments[] = {slab.ptr(), sizes.ptr(), strides.ptr(), at.ptr()};
        return owned(PyObject_Vectorcall(view_.ptr(), arguments, 4, nullptr));
    }

    TensorReader reader_;
    py::object queue_;
    const LayoutEntry* entry_;
    int64_t num_ranks_, max_experts_;
    py::object make_slab_, view_;
    py::tuple unit_;
    std::vector<Slab> slabs_;
    Call last_{};
    bool is_steady_ = false;  // the last call was like the one before
    Tensors next_{};
};

}  // namespace

void bind_layout(py::module_& m) {
    py::class_<LayoutCalls> layout(m, "LayoutCalls");
    layout.def(py::init<const py::type&, int, py::object, int64_t, int64_t, py::object, py::object>())
        .def("clear", &LayoutCalls::clear);
    def_fast<&LayoutCalls::try_run>(layout, "try_run");
    def_fast<&LayoutCalls::run>(layout, "run");
    def_fast<&LayoutCalls::prepare>(layout, "prepare");
}

}  // namespace deep_ep
