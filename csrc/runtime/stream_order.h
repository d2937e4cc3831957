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
    // After them, unless captured.
    void end(Stream stream);
    void close() noexcept;

  private:
    void* event_ = nullptr;  // after the last operation
    Stream last_ = nullptr;
    bool any_ = false;
};

}  // namespace deep_ep
