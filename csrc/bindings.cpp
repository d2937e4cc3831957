// What Python sees: only bindings*.cpp know Python. Tensors arrive as addresses, sizes and strides that deep_ep/ops.py,
// fp8.py and logfmt.py have checked; here they become the argument structs of the loops and kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/logfmt.h"
#include "cpu/quantize.h"
#include "cpu/row_loops.h"
#include "cpu/rows.h"
#include "runtime/device.h"
#include "runtime/parallel.h"
#include "runtime/pool.h"

#ifdef DEEP_EP_WITH_CUDA
#include "kernels/launch.h"
#include "runtime/device_reach.h"
#include "runtime/symmetric_heap.h"
#endif

namespace py = pybind11;

namespace deep_ep {

void bind_low_latency(py::module_& m);   // bindings_low_latency.cpp
void bind_peer_kernels(py::module_& m);  // bindings_peer.cpp
void bind_probes(py::module_& m);        // bindings_probe.cpp
void bind_inputs(py::module_& m);        // bindings_inputs.cpp
void bind_layout(py::module_& m);        // bindings_layout.cpp

namespace {

using Address = uintptr_t;  // Tensor.data_ptr()

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

int64_t gather_rows(Address x, int64_t num_x_rows, int64_t x_stride, Address index, bool index_is_int64,
                    int64_t num_rows, int64_t row_bytes, Address out, int64_t out_stride) {
    return cpu::gather_rows({pointer<const uint8_t>(x), num_x_rows, x_stride, pointer<const void>(index),
                             index_is_int64, num_rows, row_bytes, pointer<uint8_t>(out), out_stride});
}

// A sequence of (address, rows, stride in bytes).
std::vector<cpu::ReduceColumn> read_columns(const py::sequence& columns) {
    std::vector<cpu::ReduceColumn> result;
    result.reserve(columns.size());
    for (const auto& item : columns) {
        const auto column = py::reinterpret_borrow<py::sequence>(item);
        result.push_back({pointer<const void>(column[0].cast<Address>()), column[1].cast<int64_t>(),
                          column[2].cast<int64_t>()});
    }
    return result;
}

int64_t reduce_rows(const py::sequence& columns, const py::sequence& biases, Address slots,
                    int64_t slots_stride, Address weights, int64_t weights_stride, int64_t num_tokens,
                    int64_t hidden, int in_type, int out_type, int round_every, Address out,
                    int64_t out_stride) {
    const auto column_list = read_columns(columns);
    const auto bias_list = read_columns(biases);
    const cpu::ReduceRows args{column_list.data(),
                               static_cast<int>(column_list.size()),
                               bias_list.data(),
                               static_cast<int>(bias_list.size()),
                               pointer<const int32_t>(slots),
                               slots_stride,
                               pointer<const float>(weights),
                               weights_stride,
                               num_tokens,
                               hidden,
                               static_cast<ElementType>(in_type),
                               static_cast<ElementType>(out_type),
                               round_every,
                               pointer(out),
                               out_stride};
    py::gil_scoped_release release;
    return cpu::reduce_rows(args);
}

void quantize_rows(Address x, int64_t x_stride, int in_type, int64_t num_rows, int64_t channels, Address q,
                   int64_t q_stride, Address scales, int64_t scales_row_stride, int64_t scales_column_stride,
                   int format) {
    cpu::quantize_rows({pointer<const void>(x), x_stride, static_cast<ElementType>(in_type), num_rows,
                        channels, pointer<uint8_t>(q), q_stride, pointer(scales), scales_row_stride,
                        scales_column_stride, static_cast<ScaleFormat>(format)});
}

void dequantize_rows(Address q, int64_t q_stride, int64_t num_rows, int64_t channels, Address scales,
                     int64_t scales_row_stride, int64_t scales_column_stride, bool scales_packed,
                     int scale_rows, int out_type, Address out, int64_t out_stride) {
    cpu::dequantize_rows({pointer<const uint8_t>(q), q_stride, num_rows, channels,
                          pointer<const void>(scales), scales_row_stride, scales_column_stride, scales_packed,
                          scale_rows, static_cast<ElementType>(out_type), pointer(out), out_stride});
}

void quantize_blocks(Address x, int64_t x_stride, int in_type, int64_t num_rows, int64_t channels, bool pow2,
                     Address q, Address scales) {
    cpu::quantize_blocks({pointer<const void>(x), x_stride, static_cast<ElementType>(in_type), num_rows,
                          channels, pow2, pointer<uint8_t>(q), pointer<float>(scales)});
}

void quantize_transposed(Address x, int64_t x_stride, int in_type, int64_t num_tokens, int64_t channels,
                         Address q, Address scales, int64_t scales_row_stride, int64_t scales_column_stride,
                         int format) {
    cpu::quantize_transposed({pointer<const void>(x), x_stride, static_cast<ElementType>(in_type), num_tokens,
                              channels, pointer<uint8_t>(q), pointer(scales), scales_row_stride,
                              scales_column_stride, static_cast<ScaleFormat>(format)});
}

int64_t logfmt_encode(Address x, int64_t num_rows, int64_t hidden, Address out) {
    return cpu::logfmt_encode(pointer<const uint16_t>(x), num_rows, hidden, pointer<uint8_t>(out));
}

int64_t logfmt_count_rows(Address payload, int64_t bytes, int64_t hidden) {
    return cpu::logfmt_count_rows(pointer<const uint8_t>(payload), bytes, hidden);
}

void logfmt_decode(Address payload, int64_t num_rows, int64_t hidden, Address out) {
    cpu::logfmt_decode(pointer<const uint8_t>(payload), num_rows, hidden, pointer<uint16_t>(out));
}

#ifdef DEEP_EP_WITH_CUDA

void cuda_gather_rows(Address x, int64_t num_x_rows, int64_t x_stride, Address index, bool index_is_int64,
                      int64_t num_rows, int64_t row_bytes, Address out, int64_t out_stride, Address stream) {
    launch_dispatch_gather_rows({pointer<const uint8_t>(x), num_x_rows, x_stride, pointer<const void>(index),
                                 index_is_int64, num_rows, row_bytes, pointer<uint8_t>(out), out_stride},
                                pointer(stream));
}

void cuda_reduce_rows(const py::sequence& columns, const py::sequence& biases, Address slots,
                      int64_t slots_stride, Address weights, int64_t weights_stride, int64_t num_tokens,
                      int64_t hidden, int in_type, int out_type, int round_every, Address out,
                      int64_t out_stride, Address stream) {
    const auto column_list = read_columns(columns);
    const auto bias_list = read_columns(biases);
    if (column_list.size() > kMaxReduceColumns || bias_list.size() > kMaxReduceBiases) {
        throw py::value_error("combine_reduce_rows: " + std::to_string(column_list.size()) + " columns and " +
                              std::to_string(bias_list.size()) + " biases, expected at most " +
                              std::to_string(kMaxReduceColumns) + " and " + std::to_string(kMaxReduceBiases));
    }
    ReduceRowsArgs args{};
    for (const auto& column : column_list) {
        args.columns[args.num_columns++] = {column.rows, column.num_rows, column.stride};
    }
    for (const auto& bias : bias_list)
        args.biases[args.num_biases++] = {bias.rows, bias.num_rows, bias.stride};
    args.slots = pointer<const int32_t>(slots);
    args.slots_stride = slots_stride;
    args.weights = pointer<const float>(weights);
    args.weights_stride = weights_stride;
    args.num_tokens = num_tokens;
    args.hidden = hidden;
    args.round_every = round_every;
    args.out = pointer(out);
    args.out_stride = out_stride;
    py::gil_scoped_release release;
    launch_combine_reduce_rows(args, static_cast<ElementType>(in_type), static_cast<ElementType>(out_type),
                               pointer(stream));
}

void cuda_quantize_rows(Address x, int64_t x_stride, int in_type, int64_t num_rows, int64_t channels,
                        Address q, int64_t q_stride, Address scales, int64_t scales_row_stride,
                        int64_t scales_column_stride, int format, Address stream) {
    launch_dispatch_quantize_1x128(
        {pointer<const void>(x), x_stride, num_rows, channels, pointer<uint8_t>(q), q_stride, pointer(scales),
         scales_row_stride, scales_column_stride, false},
        static_cast<ElementType>(in_type), static_cast<ScaleFormat>(format), pointer(stream));
}

void cuda_dequantize_rows(Address q, int64_t q_stride, int64_t num_rows, int64_t channels, Address scales,
                          int64_t scales_row_stride, int64_t scales_column_stride, bool scales_packed,
                          int out_type, Address out, int64_t out_stride, Address stream) {
    launch_dispatch_dequantize_1x128(
        {pointer<const uint8_t>(q), q_stride, num_rows, channels, pointer<const void>(scales),
         scales_row_stride, scales_column_stride, scales_packed, pointer(out), out_stride, false},
        static_cast<ElementType>(out_type), pointer(stream));
}

// Peer memory. The calls that reach the driver may take milliseconds and run without the GIL.
py::tuple create_chunk(SymmetricHeap& heap, int64_t bytes, int64_t control_bytes) {
    ChunkHandle chunk;
    {
        py::gil_scoped_release release;
        chunk = heap.create_chunk(bytes, control_bytes);
    }
    return py::make_tuple(chunk.bytes, chunk.fd, py::bytes(chunk.blob));
}

py::dict heap_usage(const SymmetricHeap& heap) {
    const HeapUsage usage = heap.usage();
    py::dict result;
    result["reserve_bytes"] = usage.reserve_bytes;
    result["mapped_bytes"] = usage.mapped_bytes;
    result["control_bytes"] = usage.control_bytes;
    result["used_bytes"] = usage.used_bytes;
    result["free_bytes"] = usage.free_bytes;
    result["largest_free_bytes"] = usage.largest_free_bytes;
    result["num_chunks"] = usage.num_chunks;
    result["stand_in_bytes"] = usage.stand_in_bytes;
    return result;
}

py::tuple identity_of_device(int device) {
    const DeviceIdentity identity = device_identity(device);
    return py::make_tuple(py::bytes(identity.uuid), identity.pci_bus);
}

py::dict reach_of_device(int device) {
    py::dict result;
    for (const DeviceReach& reach : device_reach(device)) {
        result[py::bytes(reach.uuid)] = py::make_tuple(reach.can_map, reach.over_nvlink);
    }
    return result;
}

void bind_peer_memory(py::module_& m) {
    using NoGil = py::call_guard<py::gil_scoped_release>;
    m.def("device_identity", &identity_of_device);
    m.def("device_reach", &reach_of_device);
    py::class_<SymmetricHeap>(m, "SymmetricHeap")
        .def(py::init([](int device, int rank, int num_ranks, int kind, int64_t reserve_bytes) {
                 return std::make_unique<SymmetricHeap>(device, rank, num_ranks,
                                                        static_cast<HandleKind>(kind), reserve_bytes);
             }),
             NoGil())
        .def("create_chunk", &create_chunk)
        .def("import_chunk", &SymmetricHeap::import_chunk, NoGil())
        .def("commit_chunk", &SymmetricHeap::commit_chunk, NoGil())
        .def("discard_chunk", &SymmetricHeap::discard_chunk, NoGil())
        .def("bases", &SymmetricHeap::bases)
        .def("offset_of", &SymmetricHeap::offset_of)
        .def("usage", &heap_usage)
        .def("granularity", &SymmetricHeap::granularity)
        .def("activate", &SymmetricHeap::activate)
        .def_static("is_stand_in", &SymmetricHeap::is_stand_in)
        .def("reserve_block", &SymmetricHeap::reserve_block)
        .def("return_block", &SymmetricHeap::return_block)
        .def("destroy", &SymmetricHeap::destroy, NoGil());
}

void bind_cuda(py::module_& m) {
    using NoGil = py::call_guard<py::gil_scoped_release>;
    m.def("cuda_gather_rows", &cuda_gather_rows, NoGil());
    m.def("cuda_reduce_rows", &cuda_reduce_rows);
    m.def("cuda_quantize_rows", &cuda_quantize_rows, NoGil());
    m.def("cuda_dequantize_rows", &cuda_dequantize_rows, NoGil());
    bind_peer_memory(m);
    bind_peer_kernels(m);
    bind_probes(m);
}

#endif  // DEEP_EP_WITH_CUDA

}  // namespace
}  // namespace deep_ep

PYBIND11_MODULE(_C, m) {
    using namespace deep_ep;
    m.doc() =
        "Native loops and kernels of deep_ep. Internal: use deep_ep.ops, deep_ep.fp8 and deep_ep.logfmt.";
    using NoGil = py::call_guard<py::gil_scoped_release>;
    m.def("gather_rows", &gather_rows, NoGil());
    m.def("reduce_rows", &reduce_rows);  // reads Python sequences, then releases the GIL itself
    m.def("quantize_rows", &quantize_rows, NoGil());
    m.def("dequantize_rows", &dequantize_rows, NoGil());
    m.def("quantize_blocks", &quantize_blocks, NoGil());
    m.def("quantize_transposed", &quantize_transposed, NoGil());
    m.def("logfmt_max_bytes", &cpu::logfmt_max_bytes);
    m.def("logfmt_encode", &logfmt_encode, NoGil());
    m.def("logfmt_count_rows", &logfmt_count_rows, NoGil());
    m.def("logfmt_decode", &logfmt_decode, NoGil());
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", &set_num_threads);
    m.def("cpu_isa", [] { return cpu::row_loops().name; });
    m.attr("has_cuda") = built_with_cuda();
    m.def("cuda_build_archs", &cuda_build_archs);
    m.def("cuda_runtime_version", &cuda_runtime_version);
    m.def("device_count", &device_count);
    py::class_<BlockAllocator>(m, "BlockAllocator")
        .def(py::init<>())
        .def("add", &BlockAllocator::add)
        .def("allocate", &BlockAllocator::allocate)
        .def("free", &BlockAllocator::free)
        .def_property_readonly("bytes_used", &BlockAllocator::bytes_used)
        .def_property_readonly("bytes_free", &BlockAllocator::bytes_free)
        .def_property_readonly("largest_free", &BlockAllocator::largest_free)
        .def_property_readonly("num_used", &BlockAllocator::num_used);
#ifdef DEEP_EP_WITH_CUDA
    bind_cuda(m);
#endif
    bind_inputs(m);
    bind_layout(m);
    bind_low_latency(m);  // after the classes that it names
}
