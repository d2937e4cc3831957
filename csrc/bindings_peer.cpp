// What Python sees of the kernels over peers' memory. deep_ep/engines/cuda.py has checked what arrives here.
#ifdef DEEP_EP_WITH_CUDA

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "bindings_call.h"
#include "bindings_layout.h"
#include "kernels/peer_launch.h"
#include "layout/expert_range.h"
#include "runtime/peer_domain.h"
#include "runtime/push_copies.h"
#include "runtime/stream_order.h"
#include "sync/planted.h"

namespace py = pybind11;

namespace deep_ep {

void bind_peer_kernels(py::module_& m);

namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Offsets of rows, scales, topk_idx, topk_weights and src_idx, and the capacity.
using Outputs = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

OutputOffsets output_offsets(const Outputs& t) {
    return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t), std::get<5>(t)};
}

void load_kernels() {
    prepare_dispatch_layout();
    prepare_dispatch_notify();
    prepare_dispatch_rows();
    prepare_dispatch_rows_fp8();
    prepare_dispatch_refuse();
    prepare_dispatch_combine_copy();
    prepare_combine_rows();
}

// Where layouts are counted: the order between streams, and the failures that end it all.
class LayoutQueue {
  public:
    LayoutQueue(PeerDomain& peers, StreamOrder& order) : peers_(peers), order_(order) {}
    LayoutQueue(const LayoutQueue&) = delete;
    LayoutQueue& operator=(const LayoutQueue&) = delete;

    Address entry() const { return reinterpret_cast<Address>(&entry_); }

  private:
    static int begin(void* owner, Address stream) {
        const auto* self = static_cast<const LayoutQueue*>(owner);
        if (self->peers_.host().error != 0) return -1;
        return self->order_.begin(pointer(stream)) ? 1 : 0;
    }
    static void launch(void* owner, const LayoutArguments* call, Address stream, bool captured) {
        const auto* self = static_cast<const LayoutQueue*>(owner);
        launch_dispatch_layout(
            {self->peers_.domain(), pointer<const void>(call->topk_idx), call->is_int64 != 0,
             static_cast<int>(call->num_tokens), static_cast<int>(call->num_topk),
             static_cast<int>(call->num_experts), pointer<int32_t>(call->per_rank),
             pointer<int32_t>(call->per_expert), pointer<uint8_t>(call->in_rank)},
            pointer(stream));
        if (!captured) self->order_.end(pointer(stream));
    }

    PeerDomain& peers_;
    StreamOrder& order_;
    LayoutEntry entry_{this, &begin, &launch};
};

// What all dispatches of one kind of rows have in common; each launch adds addresses and sizes.
class DispatchPlan {
  public:
    // element_type: of rows that are quantised on the way, -1 for rows that travel as they are.
    DispatchPlan(PeerDomain& peers, int64_t row_bytes, int scales_per_token, int num_topk, bool topk_is_int64,
                 int element_type, int scale_format)
        : peers_(peers), quantises_(element_type >= 0) {
        rows_.row_bytes = row_bytes;
        rows_.scales_per_token = scales_per_token;
        rows_.num_topk = num_topk;
        rows_.topk_is_int64 = topk_is_int64;
        rows_.type = static_cast<ElementType>(quantises_ ? element_type : 0);
        rows_.format = static_cast<ScaleFormat>(scale_format);
    }

    // What is sent. Strides in elements; scales, topk_idx and topk_weights may be 0.
    using Sent = std::tuple<int, Address, Address, std::tuple<int64_t, int64_t>, Address, Address>;

    // Exchanges counts, writes the handle, and places the rows.
    // layout: num_tokens_per_expert, is_token_in_rank.
    // handle: rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix, send_head.
    void route(uint64_t signature, const Outputs& output, bool fixed_capacity, int num_experts,
               int num_channels, const std::tuple<Address, Address>& layout,
               const std::tuple<Address, Address, Address, Address>& handle, const Sent& sent, int num_sms,
               Address stream) const {
        const auto& [per_expert, in_rank] = layout;
        const auto& [rank_prefix, channel_prefix, recv_channel_prefix, send_head] = handle;
        if (!fixed_capacity) peers_.expect_counts();
        launch_dispatch_notify(
            {peers_.domain(), signature, output_offsets(output), fixed_capacity, std::get<0>(sent),
             num_experts, num_channels, pointer<const int32_t>(per_expert), pointer<const uint8_t>(in_rank),
             pointer<int32_t>(rank_prefix), pointer<int32_t>(channel_prefix),
             pointer<int32_t>(recv_channel_prefix), pointer<int32_t>(send_head)},
            pointer(stream));
        launch_rows(signature, false, output, num_experts, send_head, sent, num_sms, stream);
    }

    // Announces where this rank wants its rows, and places those of the peers, by a handle that is there.
    void repeat(uint64_t signature, const Outputs& output, int num_experts, Address send_head,
                const Sent& sent, int num_sms, Address stream) const {
        launch_rows(signature, true, output, num_experts, send_head, sent, num_sms, stream);
    }

  private:
    void launch_rows(uint64_t signature, bool announce, const Outputs& output, int num_experts,
                     Address send_head, const Sent& sent, int num_sms, Address stream) const {
        const auto& [num_tokens, rows, scales, scales_strides, topk_idx, topk_weights] = sent;
        DispatchRowsArgs args = rows_;
        args.domain = peers_.domain();
        args.signature = signature;
        args.announce = announce;
        args.output = output_offsets(output);
        args.num_tokens = num_tokens;
        args.num_experts = num_experts;
        args.send_head = pointer<const int32_t>(send_head);
        args.rows = pointer<const uint8_t>(rows);
        args.scales = pointer<const uint8_t>(scales);
        args.scales_token_stride = std::get<0>(scales_strides);
        args.scales_stride = std::get<1>(scales_strides);
        args.topk_idx = pointer<const void>(topk_idx);
        args.topk_weights = pointer<const float>(topk_weights);
        if (quantises_) {
            launch_dispatch_rows_fp8(args, num_sms, pointer(stream));
        } else {
            launch_dispatch_rows(args, num_sms, pointer(stream));
        }
    }

    PeerDomain& peers_;
    bool quantises_;
    DispatchRowsArgs rows_{};
};

// segments: (from, to, bytes), addresses in this rank's memory.
void copy_segments(const std::vector<std::tuple<Address, Address, int64_t>>& segments, int num_sms,
                   Address stream) {
    CopySegmentsArgs args{};
    for (const auto& [from, to, bytes] : segments) {
        if (args.num_segments == kMaxSegments) throw py::value_error("copy_segments: too many segments");
        args.segments[args.num_segments++] = {pointer<const uint8_t>(from), pointer<uint8_t>(to), bytes};
    }
    launch_dispatch_combine_copy(args, num_sms, pointer(stream));
}

// rows and weights: (address, offset in the own heap or -1).
using Placed = std::tuple<Address, int64_t>;

void combine_rows(PeerDomain& self, uint64_t signature, const Placed& rows, const Placed& weights,
                  uint64_t push_number, Address inbox, Address rank_prefix, int num_tokens, Address send_head,
                  int64_t hidden, int type, const std::vector<Address>& biases, Address out, int num_topk,
                  Address out_weights, int num_sms, Address stream) {
    CombineRowsArgs args{};
    args.domain = self.domain();
    args.signature = signature;
    args.rows = pointer<const uint8_t>(std::get<0>(rows));
    args.rows_offset = std::get<1>(rows);
    args.weights = pointer<const float>(std::get<0>(weights));
    args.weights_offset = std::get<1>(weights);
    args.push_number = push_number;
    args.inbox = pointer<uint8_t>(inbox);
    args.rank_prefix = pointer<const int32_t>(rank_prefix);
    args.num_tokens = num_tokens;
    args.send_head = pointer<const int32_t>(send_head);
    args.hidden = hidden;
    args.type = static_cast<ElementType>(type);
    if (biases.size() > std::size(args.biases)) throw py::value_error("combine_rows: too many biases");
    for (Address bias : biases) args.biases[args.num_biases++] = pointer<const uint8_t>(bias);
    args.out = pointer<uint8_t>(out);
    args.num_topk = num_topk;
    args.out_weights = pointer<float>(out_weights);
    launch_combine_rows(args, num_sms, pointer(stream));
}

// Waits for what dispatch_notify tells the host: rows received here, whether all ranks have room for theirs, tokens of
// each local expert, rows from each rank to each, and of these the most that one rank receives, or gets back from others.
// Without counts: whether a peer gave the operation up, rather than a failure.
PyObject* await_counts(PeerDomain& self, int num_experts) {
    PeerDomain::Outcome outcome{};
    {
        py::gil_scoped_release no_gil;
        outcome = self.wait_counts();
    }
    if (outcome != PeerDomain::Outcome::kCounts)
        return PyBool_FromLong(outcome == PeerDomain::Outcome::kRefused);
    const Domain& domain = self.domain();
    const HostRecord& host = self.host();
    const int num_ranks = domain.num_ranks;
    const auto list_of = [](const volatile int32_t* values, int count) {
        auto list = py::reinterpret_steal<py::object>(PyList_New(count));
        if (!list) throw py::error_already_set();
        for (int i = 0; i < count; ++i) {
            PyObject* value = PyLong_FromLong(values[i]);
            if (value == nullptr) throw py::error_already_set();
            PyList_SET_ITEM(list.ptr(), i, value);
        }
        return list;
    };
    py::object experts = list_of(host.expert_counts, expert_range(num_experts, num_ranks, domain.rank).count);
    py::list sent(num_ranks);
    int64_t most_received = 0, most_away = 0, received[kMaxPeers] = {};
    for (int src = 0; src < num_ranks; ++src) {
        const volatile int32_t* const counts = host.send_counts + src * num_ranks;
        int64_t away = 0;
        for (int dst = 0; dst < num_ranks; ++dst) {
            received[dst] += counts[dst];
            if (dst != src) away += counts[dst];
        }
        sent[static_cast<size_t>(src)] = list_of(counts, num_ranks);
        most_away = std::max(most_away, away);
    }
    for (int64_t count : received) most_received = std::max(most_received, count);
    return tuple_of(int64_t{host.num_recv}, PyBool_FromLong(host.fits != 0), experts.release().ptr(),
                    sent.release().ptr(), most_received, most_away);
}

PyObject* error(PeerDomain& self) {
    const HostRecord& host = self.host();
    if (host.error == 0) Py_RETURN_NONE;
    return tuple_of(int64_t{host.error}, int64_t{host.operation}, int64_t{host.phase}, int64_t{host.peer},
                    uint64_t{host.expected}, uint64_t{host.seen});
}

py::object take_overflow(PeerDomain& self) {
    HostRecord& host = self.host();
    if (host.overflow_total == 0) return py::none();
    const auto result =
        py::make_tuple(host.overflow_rank + 0, host.overflow_total + 0, host.overflow_capacity + 0);
    host.overflow_total = 0;
    return result;
}

py::object take_refused(PeerDomain& self) {
    HostRecord& host = self.host();
    if (host.refused_by == 0) return py::none();
    const int rank = host.refused_by - 1;
    host.refused_by = 0;
    return py::int_(rank);
}

py::object take_late(PeerDomain& self) {
    const auto late = self.take_late();
    if (!late) return py::none();
    return py::make_tuple(late->operation, late->phase, late->peer, late->expected, late->seen);
}

py::dict planted_bugs() {
    py::dict result;
    for (const PlantedBug& bug : kPlantedBugs) result[bug.name] = 1u << static_cast<uint32_t>(bug.broken);
    return result;
}

void bind_domain(py::module_& m) {
    py::class_<PeerDomain> domain(m, "PeerDomain");
    def_fast<&combine_rows>(domain, "combine_rows");
    def_fast<&await_counts>(domain, "await_counts");
    def_fast<&error>(domain, "error");
    domain.def(py::init<const std::vector<uintptr_t>&, int, double>())
        .def("refuse",
             [](PeerDomain& self, Address stream) { launch_dispatch_refuse(self.domain(), pointer(stream)); })
        .def(
            "dispatch_plan",
            [](PeerDomain& self, int64_t row_bytes, int scales_per_token, int num_topk, bool topk_is_int64,
               int element_type, int scale_format) {
                return DispatchPlan(self, row_bytes, scales_per_token, num_topk, topk_is_int64, element_type,
                                    scale_format);
            },
            py::keep_alive<0, 1>())
        .def("take_overflow", &take_overflow)
        .def("take_refused", &take_refused)
        .def_property("warn_after_s", &PeerDomain::warn_after, &PeerDomain::set_warn_after)
        .def("take_late", &take_late)
        .def("set_debug", &PeerDomain::set_debug)
        .def("give_up", &PeerDomain::give_up)
        .def("reset", &PeerDomain::reset)
        .def("close", &PeerDomain::close);
    py::class_<DispatchPlan> plan(m, "DispatchPlan");
    def_fast<&DispatchPlan::route>(plan, "route");
    def_fast<&DispatchPlan::repeat>(plan, "repeat");
}

}  // namespace

void bind_peer_kernels(py::module_& m) {
    m.attr("PLANTED_BUGS") = planted_bugs();
    m.attr("CONTROL_BLOCK_BYTES") = static_cast<int64_t>(sizeof(ControlBlock));
    m.def("load_peer_kernels", &load_kernels);
    m.def("copy_segments", &copy_segments);
    bind_domain(m);
    py::class_<StreamOrder>(m, "StreamOrder")
        .def(py::init<>())
        .def("begin", [](StreamOrder& self, Address stream) { return self.begin(pointer(stream)); })
        .def("end", [](StreamOrder& self, Address stream) { self.end(pointer(stream)); })
        .def("close", &StreamOrder::close);
    py::class_<LayoutQueue>(m, "LayoutQueue")
        .def(py::init<PeerDomain&, StreamOrder&>(), py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def_property_readonly("entry", &LayoutQueue::entry);
    py::class_<PushCopies>(m, "PushCopies")
        .def(py::init([](PeerDomain& domain) { return std::make_unique<PushCopies>(domain.domain()); }))
        .def_static("available", &PushCopies::available)
        .def("push", &PushCopies::push)
        .def("release", &PushCopies::release)
        .def("close", &PushCopies::close);
}

}  // namespace deep_ep

#endif  // DEEP_EP_WITH_CUDA
