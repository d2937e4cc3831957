// The order of a buffer's operations when they are called on different streams. Free of CUDA headers.
#pragma once

#include "kernels/launch.h"

namespace deep_ep {

class StreamOrder {
  public:
    StreamOrder();
    ~StreamOrder();
    StreamOrder(const StreamOrder&) = delete;
    StreamOrder& operator=(const StreamOrder&) = delete;

    // Before an operation's launches: the stream waits for the operation before. True if the stream is being captured into
    // a graph, whose order is that of its replays: nothing is waited for or recorded then.
    bool begin(Stream stream);
    // After them, unless captured. As long as all operations were on the default stream, it does nothing: an event costs
    // the host about 1 us, and can still be recorded there when another stream comes.
    void end(Stream stream);
    void close() noexcept;

  private:
    void record();

    void* event_ = nullptr;  // after the last operation
    Stream last_ = nullptr;
    bool any_ = false;
    bool several_ = false;  // the event is recorded after every operation
};

}  // namespace deep_ep
