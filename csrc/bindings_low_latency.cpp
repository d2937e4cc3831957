// What Python sees of the low-latency kernels. deep_ep/engines/cuda_ll.py has checked what arrives here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings_low_latency.h"
#include "layout/expert_range.h"
#include "layout/low_latency_outputs.h"

#ifdef DEEP_EP_WITH_CUDA
#include "kernels/low_latency_launch.h"
#include "runtime/low_latency_peers.h"
#include "runtime/stream_order.h"
#endif

namespace py = pybind11;

namespace deep_ep {

void bind_low_latency(py::module_& m);
void bind_low_latency_operations(py::module_& m);  // bindings_low_latency_operations.cpp
void bind_low_latency_calls(py::module_& m);       // bindings_low_latency_calls.cpp

namespace {

LowLatencyLayout layout_of(int num_ranks, int num_max_tokens, int num_topk, int num_experts, int64_t hidden) {
    return LowLatencyLayout::make(num_ranks, num_max_tokens, num_topk,
                                  expert_range(num_experts, num_ranks, 0).count, hidden);
}

// Bytes of a region and of its parts.
py::dict layout_bytes(int num_ranks, int num_max_tokens, int num_topk, int num_experts, int64_t hidden) {
    const LowLatencyLayout layout = layout_of(num_ranks, num_max_tokens, num_topk, num_experts, hidden);
    py::dict result;
    result["total"] = layout.num_bytes;
    result["state"] = layout.state_bytes();
    result["slot"] = layout.slot_bytes;
    result["line_row"] = layout.line_row_bytes;
    result["dispatch_line_tokens"] = layout.dispatch_line_tokens;
    result["combine_line_tokens"] = layout.combine_line_tokens;
    result["dispatch_slots"] = layout.combine_slots_at - layout.dispatch_slots_at;
    result["combine_slots"] = layout.num_bytes - layout.combine_slots_at;
    return result;
}

// Offset of each thing in a region by its name; for tests, which hold that none of them overlap.
py::dict layout_offsets(int num_ranks, int num_max_tokens, int num_topk, int num_experts, int64_t hidden,
                        int set, int rank, int token, int part) {
    const LowLatencyLayout layout = layout_of(num_ranks, num_max_tokens, num_topk, num_experts, hidden);
    py::dict result;
    result["control"] = 0;
    result["dispatch_header"] = layout.header(LowLatencyKind::kDispatch, set, rank);
    result["dispatch_counts"] = layout.dispatch_counts(set, rank);
    result["dispatch_entries"] = layout.dispatch_entries(set, rank);
    result["dispatch_weights"] = layout.dispatch_weights(set, rank);
    result["combine_header"] = layout.header(LowLatencyKind::kCombine, set, rank);
    result["combine_selections"] = layout.combine_selections(set, rank);
    result["dispatch_flag"] = layout.dispatch_flag(set, rank, token, part);
    result["combine_flag"] = layout.combine_flag(set, token, rank, part);
    result["dispatch_lines"] = layout.dispatch_lines(set, rank, token);
    result["combine_lines"] = layout.combine_lines(set, token, rank);
    result["dispatch_slot"] = layout.dispatch_slot(set, rank, token);
    result["combine_slot"] = layout.combine_slot(set, token, rank);
    return result;
}

py::tuple cut(int64_t row_bytes, int64_t wanted) {
    const RowPieces pieces = cut_row(row_bytes, wanted);
    return py::make_tuple(pieces.count, pieces.bytes);
}

void bind_outputs(py::module_& m) {
    py::class_<LowLatencyOutputs>(m, "LowLatencyOutputs")
        .def(py::init(&LowLatencyOutputs::make))
        .def_readonly("ticket_at", &LowLatencyOutputs::ticket_at)
        .def_readonly("recv_count_at", &LowLatencyOutputs::recv_count_at)
        .def_readonly("src_info_at", &LowLatencyOutputs::src_info_at)
        .def_readonly("source_tokens_at", &LowLatencyOutputs::source_tokens_at)
        .def_readonly("positions_at", &LowLatencyOutputs::positions_at)
        .def_readonly("weights_at", &LowLatencyOutputs::weights_at)
        .def_readonly("small_block_bytes", &LowLatencyOutputs::small_block_bytes);
}

#ifdef DEEP_EP_WITH_CUDA

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Where operations are enqueued: the order between streams, and the failures that end it all.
class LowLatencyQueue {
  public:
    LowLatencyQueue(PeerDomain& peers, StreamOrder& order) : peers_(peers), order_(order) {}

    // See LowLatencyEntry.
    int begin(Address stream) const {
        if (peers_.host().error != 0) return -1;
        return order_.begin(pointer(stream)) ? 1 : 0;
    }
    // After an operation that is not captured.
    void end(Address stream) const { order_.end(pointer(stream)); }

  private:
    PeerDomain& peers_;
    StreamOrder& order_;
};

// The functions of a plan of either kind, at an address that lasts as long as the plan.
template <class Plan, class Arguments>
class Entry {
  public:
    explicit Entry(Plan* plan) : entry_{plan, &begin, &launch} {}
    Address address() const { return reinterpret_cast<Address>(&entry_); }

  private:
    static int begin(void* plan, Address stream) {
        return static_cast<const Plan*>(plan)->queue().begin(stream);
    }
    static void launch(void* plan, const void* arguments, int part, int num_sms, Address stream,
                       bool captured) {
        const auto* self = static_cast<const Plan*>(plan);
        self->launch(*static_cast<const Arguments*>(arguments), static_cast<LowLatencyPart>(part), num_sms,
                     pointer(stream));
        if (!captured) self->queue().end(stream);
    }

    LowLatencyEntry entry_;
};

// Everything of a dispatch that does not change from call to call with the same shapes.
class LowLatencyDispatchPlan {
  public:
    // format: a ScaleFormat, -1 for bf16 rows.
    LowLatencyDispatchPlan(const LowLatencyPeers& peers, const LowLatencyQueue& queue, uint64_t signature,
                           int num_topk, bool topk_is_int64, int num_experts, int num_max_tokens, int hidden,
                           int format, bool with_weights, bool expert_major)
        : peers_(peers), queue_(queue), with_weights_(with_weights) {
        const Domain domain = peers.domain().domain;
        const bool use_fp8 = format >= 0;
        const auto scale_format = static_cast<ScaleFormat>(use_fp8 ? format : 0);
        outputs_ =
            LowLatencyOutputs::make(expert_range(num_experts, domain.num_ranks, domain.rank).count,
                                    domain.num_ranks, num_max_tokens, num_topk, with_weights, expert_major);
        args_.signature = signature;
        args_.topk_is_int64 = topk_is_int64;
        args_.num_topk = num_topk;
        args_.num_experts = num_experts;
        args_.num_max_tokens = num_max_tokens;
        args_.hidden = hidden;
        args_.use_fp8 = use_fp8;
        args_.format = scale_format;
        args_.expert_major = expert_major;
    }

    LowLatencyDispatchPlan(const LowLatencyDispatchPlan&) = delete;
    LowLatencyDispatchPlan& operator=(const LowLatencyDispatchPlan&) = delete;

    const LowLatencyQueue& queue() const { return queue_; }
    const LowLatencyOutputs& outputs() const { return outputs_; }
    Address entry() const { return entry_.address(); }

    void launch(const LowLatencyDispatchArguments& call, LowLatencyPart part, int num_sms,
                Stream stream) const {
        LowLatencyDispatchArgs args = args_;
        args.ll = peers_.domain();
        args.x = pointer<const uint8_t>(call.x);
        args.topk_idx = pointer<const void>(call.topk_idx);
        args.topk_weights = pointer<const float>(call.topk_weights);
        args.num_tokens = static_cast<int>(call.num_tokens);
        args.rows = pointer<uint8_t>(call.rows);
        args.scales = pointer<uint32_t>(call.scales);
        const Address small = call.small;
        args.layout_range = pointer<int64_t>(small);
        args.ticket = pointer<uint64_t>(small + outputs_.ticket_at);
        args.recv_count = pointer<int32_t>(small + outputs_.recv_count_at);
        args.src_info = pointer<int32_t>(small + outputs_.src_info_at);
        args.source_tokens = pointer<int32_t>(small + outputs_.source_tokens_at);
        args.positions = pointer<int32_t>(small + outputs_.positions_at);
        if (with_weights_) args.weights = pointer<float>(small + outputs_.weights_at);
        args.recv_stats = pointer<int32_t>(call.recv_stats);
        args.wait_stats = pointer<int64_t>(call.wait_stats);
        launch_low_latency_dispatch(args, part, num_sms, stream);
    }

  private:
    const LowLatencyPeers& peers_;
    const LowLatencyQueue& queue_;
    bool with_weights_;
    LowLatencyOutputs outputs_{};
    LowLatencyDispatchArgs args_{};
    Entry<LowLatencyDispatchPlan, LowLatencyDispatchArguments> entry_{this};
};

// The shape of a combine: as for LowLatencyDispatchPlan.
class LowLatencyCombinePlan {
  public:
    LowLatencyCombinePlan(const LowLatencyPeers& peers, const LowLatencyQueue& queue, uint64_t signature,
                          int num_topk, bool topk_is_int64, int num_experts, int num_max_tokens, int hidden,
                          bool sum_at_home, bool use_logfmt, bool expert_major)
        : peers_(peers), queue_(queue) {
        args_.signature = signature;
        args_.num_topk = num_topk;
        args_.topk_is_int64 = topk_is_int64;
        args_.num_experts = num_experts;
        args_.num_max_tokens = num_max_tokens;
        args_.hidden = hidden;
        args_.sum_at_home = sum_at_home;
        args_.use_logfmt = use_logfmt;
        args_.expert_major = expert_major;
    }

    LowLatencyCombinePlan(const LowLatencyCombinePlan&) = delete;
    LowLatencyCombinePlan& operator=(const LowLatencyCombinePlan&) = delete;

    const LowLatencyQueue& queue() const { return queue_; }
    Address entry() const { return entry_.address(); }

    void launch(const LowLatencyCombineArguments& call, LowLatencyPart part, int num_sms,
                Stream stream) const {
        LowLatencyCombineArgs args = args_;
        args.ll = peers_.domain();
        args.x = pointer<const uint8_t>(call.x);
        args.src_info = pointer<const int32_t>(call.src_info);
        args.layout_range = pointer<const int64_t>(call.layout_range);
        args.source_tokens = pointer<const int32_t>(call.source_tokens);
        args.positions = pointer<const int32_t>(call.positions);
        args.weights = pointer<const float>(call.weights);
        args.topk_idx = pointer<const void>(call.topk_idx);
        args.topk_weights = pointer<const float>(call.topk_weights);
        args.num_tokens = static_cast<int>(call.num_tokens);
        args.out = pointer<uint8_t>(call.out);
        args.wait_stats = pointer<int64_t>(call.wait_stats);
        args.ticket = pointer<uint64_t>(call.ticket);
        launch_low_latency_combine(args, part, num_sms, stream);
    }

  private:
    const LowLatencyPeers& peers_;
    const LowLatencyQueue& queue_;
    LowLatencyCombineArgs args_{};
    Entry<LowLatencyCombinePlan, LowLatencyCombineArguments> entry_{this};
};

void load_kernels() {
    prepare_low_latency_dispatch();
    prepare_low_latency_combine();
}

void bind_kernels(py::module_& m) {
    m.def("load_low_latency_kernels", &load_kernels);
    // carries_lines: whether lines arrive whole at every rank. masked and last_waits_ns: addresses of uint32 [R] and uint64 [2, R].
    py::class_<LowLatencyPeers>(m, "LowLatencyPeers")
        .def(py::init([](const PeerDomain& peers, const std::vector<Address>& regions, int num_max_tokens,
                         int num_topk, int num_experts, int64_t hidden, bool carries_lines, Address masked,
                         Address last_waits_ns, double mask_after_s) {
                 const LowLatencyShared shared{pointer<uint32_t>(masked), pointer<uint64_t>(last_waits_ns),
                                               static_cast<uint64_t>(mask_after_s * 1e9)};
                 auto layout = layout_of(static_cast<int>(regions.size()), num_max_tokens, num_topk,
                                         num_experts, hidden);
                 if (!carries_lines) layout.dispatch_line_tokens = layout.combine_line_tokens = 0;
                 return std::make_unique<LowLatencyPeers>(peers, regions, layout, shared);
             }),
             py::keep_alive<1, 2>())
        .def("clear", &LowLatencyPeers::clear, py::call_guard<py::gil_scoped_release>())
        .def("refuse", [](const LowLatencyPeers& self, int kind, Address stream) {
            launch_low_latency_refuse(self.domain(), static_cast<LowLatencyKind>(kind), pointer(stream));
        });
    py::class_<LowLatencyQueue>(m, "LowLatencyQueue")
        .def(py::init<PeerDomain&, StreamOrder&>(), py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def("begin", &LowLatencyQueue::begin)
        .def("end", &LowLatencyQueue::end);
    py::class_<LowLatencyDispatchPlan>(m, "LowLatencyDispatchPlan")
        .def(py::init<const LowLatencyPeers&, const LowLatencyQueue&, uint64_t, int, bool, int, int, int, int,
                      bool, bool>(),
             py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def_property_readonly("outputs", &LowLatencyDispatchPlan::outputs)
        .def_property_readonly("entry", &LowLatencyDispatchPlan::entry);
    py::class_<LowLatencyCombinePlan>(m, "LowLatencyCombinePlan")
        .def(py::init<const LowLatencyPeers&, const LowLatencyQueue&, uint64_t, int, bool, int, int, int,
                      bool, bool, bool>(),
             py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def_property_readonly("entry", &LowLatencyCombinePlan::entry);
}

#endif  // DEEP_EP_WITH_CUDA

}  // namespace

void bind_low_latency(py::module_& m) {
    m.attr("LOW_LATENCY_LIMITS") =
        py::dict(py::arg("ranks") = kMaxPeers, py::arg("tokens") = kMaxLowLatencyTokens - 1,
                 py::arg("topk") = kMaxLowLatencyTopk, py::arg("local_experts") = kMaxLocalExperts,
                 py::arg("experts") = kMaxLayoutExperts, py::arg("packed_rows") = kMaxPackedRows);
    m.def("low_latency_layout", &layout_bytes);
    m.def("low_latency_offsets", &layout_offsets);
    m.def("low_latency_cut_row", &cut);
    m.def("small_quotient", [](int n, int divisor) { return SmallDivider::of(divisor).quotient(n); });
    m.def("expert_owner", [](int expert, int num_experts, int num_ranks) {
        const ExpertMap map = ExpertMap::of(num_experts, num_ranks);
        const int owner = map.owner(expert);
        return py::make_tuple(owner, map.first(owner), map.count(owner));
    });
    bind_outputs(m);
    bind_low_latency_operations(m);
    bind_low_latency_calls(m);
#ifdef DEEP_EP_WITH_CUDA
    bind_kernels(m);
#endif
}

}  // namespace deep_ep
