#include "runtime/stream_order.h"

#include <cuda_runtime_api.h>

#include "runtime/errors.h"

namespace deep_ep {

StreamOrder::StreamOrder() {
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    event_ = event;
}

StreamOrder::~StreamOrder() {
    close();
}

bool StreamOrder::begin(Stream stream) {
    auto* const cuda_stream = static_cast<cudaStream_t>(stream);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    // The legacy stream cannot be asked while another thread captures; it is not captured itself.
    if (cudaStreamIsCapturing(cuda_stream, &status) != cudaSuccess) {
        cudaGetLastError();
        status = cudaStreamCaptureStatusNone;
    }
    if (status != cudaStreamCaptureStatusNone) return true;
    if (any_ && last_ != stream) {
        if (!several_) record();
        several_ = true;
        check_cuda(cudaStreamWaitEvent(cuda_stream, static_cast<cudaEvent_t>(event_), 0), "ordering streams");
    }
    return false;
}

void StreamOrder::end(Stream stream) {
    last_ = stream;
    any_ = true;
    // A stream that the caller made may be gone, or captured, when the next one comes; the default stream never is.
    if (stream != nullptr) several_ = true;
    if (several_) record();
}

void StreamOrder::record() {
    check_cuda(cudaEventRecord(static_cast<cudaEvent_t>(event_), static_cast<cudaStream_t>(last_)),
               "recording an event");
}

void StreamOrder::close() noexcept {
    if (event_ != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(event_));
    event_ = nullptr;
    any_ = false;
}

}  // namespace deep_ep
