// Python's view of the probes (kernels/probe_launch.h): addresses as integers; the callers check what they hold.
#ifdef DEEP_EP_WITH_CUDA

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kernels/probe_launch.h"

namespace py = pybind11;

namespace deep_ep {
namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void probe_push(Address rows, Address peer_rows, Address own_rows, int num_rows, int64_t row_bytes,
                Address scales, Address peer_scales, Address own_scales, int scale_bytes, bool scales_by_bulk,
                int num_sms, int warps, int ahead, int behind, int piece_bytes, Address stream) {
    launch_probe_push({pointer<const uint8_t>(rows), pointer<uint8_t>(peer_rows), pointer<uint8_t>(own_rows),
                       num_rows, row_bytes, pointer<const uint8_t>(scales), pointer<uint8_t>(peer_scales),
                       pointer<uint8_t>(own_scales), scale_bytes, scales_by_bulk},
                      {num_sms, warps, ahead, behind, piece_bytes}, pointer(stream));
}

void probe_pull(Address peer_rows, Address own_rows, Address out, int num_rows, int64_t row_bytes,
                int num_sms, int warps, int stages, int vectors, bool own_by_bulk, bool out_by_bulk,
                bool producer, bool one_polls, Address stream) {
    launch_probe_pull({pointer<const uint8_t>(peer_rows), pointer<const uint8_t>(own_rows),
                       pointer<uint8_t>(out), num_rows, row_bytes},
                      {num_sms, warps, stages, vectors, own_by_bulk, out_by_bulk, producer, one_polls},
                      pointer(stream));
}

void probe_registers(Address source, Address target, int64_t bytes, int num_sms, int warps, Address stream) {
    launch_probe_registers({pointer<const uint8_t>(source), pointer<uint8_t>(target), bytes}, num_sms, warps,
                           pointer(stream));
}

void probe_flags(Address own_flag, Address peer_flag, Address payload, Address peer_payload,
                 int64_t payload_bytes, uint64_t first, int rounds, bool starts, double timeout_s,
                 Address result, Address stream) {
    launch_probe_flags({pointer<const uint64_t>(own_flag), pointer<uint64_t>(peer_flag),
                        pointer<const uint8_t>(payload), pointer<uint8_t>(peer_payload), payload_bytes, first,
                        rounds, starts, static_cast<uint64_t>(timeout_s * 1e9), pointer<uint64_t>(result)},
                       pointer(stream));
}

void probe_lines(Address own, Address peer, int rank, int peer_rank, int rounds, int planted, int num_sms,
                 int channels, double timeout_s, Address counts, Address stream) {
    constexpr double kMostSeconds = 600;
    if (!(timeout_s > 0 && timeout_s <= kMostSeconds)) {
        throw std::invalid_argument("deep_ep: probe: timeout_s is " + std::to_string(timeout_s) +
                                    ", expected more than 0 and at most 600");
    }
    launch_probe_lines(
        {pointer<uint8_t>(own), pointer<uint8_t>(peer), rank, peer_rank, rounds,
         static_cast<LineFault>(planted), static_cast<uint64_t>(timeout_s * 1e9), pointer<uint64_t>(counts)},
        num_sms, channels, pointer(stream));
}

py::tuple line_counts() {
    py::tuple names(kNumLineCounts);
    for (int i = 0; i < kNumLineCounts; ++i) names[i] = kLineCounts[i];
    return names;
}

py::dict line_faults() {
    py::dict result;
    for (const PlantedLineFault& planted : kPlantedLineFaults) {
        result[planted.name] = static_cast<int>(planted.fault);
    }
    return result;
}

}  // namespace

void bind_probes(py::module_& m) {
    using NoGil = py::call_guard<py::gil_scoped_release>;
    using namespace py::literals;
    m.def("probe_push", &probe_push, py::kw_only(), "rows"_a, "peer_rows"_a, "own_rows"_a, "num_rows"_a,
          "row_bytes"_a, "scales"_a, "peer_scales"_a, "own_scales"_a, "scale_bytes"_a, "scales_by_bulk"_a,
          "num_sms"_a, "warps"_a, "ahead"_a, "behind"_a, "piece_bytes"_a, "stream"_a, NoGil());
    m.def("probe_pull", &probe_pull, py::kw_only(), "peer_rows"_a, "own_rows"_a, "out"_a, "num_rows"_a,
          "row_bytes"_a, "num_sms"_a, "warps"_a, "stages"_a, "vectors"_a, "own_by_bulk"_a, "out_by_bulk"_a,
          "producer"_a, "one_polls"_a, "stream"_a, NoGil());
    m.def("probe_registers", &probe_registers, py::kw_only(), "source"_a, "target"_a, "bytes"_a, "num_sms"_a,
          "warps"_a, "stream"_a, NoGil());
    m.def("probe_flags", &probe_flags, py::kw_only(), "own_flag"_a, "peer_flag"_a, "payload"_a,
          "peer_payload"_a, "payload_bytes"_a, "first"_a, "rounds"_a, "starts"_a, "timeout_s"_a, "result"_a,
          "stream"_a, NoGil());
    m.attr("PROBE_LINES_COUNTS") = line_counts();
    m.attr("PROBE_LINES_FAULTS") = line_faults();
    m.def("probe_lines_bytes", &probe_lines_bytes, "num_channels"_a);
    m.def("probe_lines", &probe_lines, py::kw_only(), "own"_a, "peer"_a, "rank"_a, "peer_rank"_a, "rounds"_a,
          "planted"_a, "num_sms"_a, "channels"_a, "timeout_s"_a, "counts"_a, "stream"_a, NoGil());
}

}  // namespace deep_ep

#endif  // DEEP_EP_WITH_CUDA
