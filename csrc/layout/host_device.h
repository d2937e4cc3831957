// Functions that host and device compile alike, so that neither can disagree with the other.
#pragma once

#ifdef __CUDACC__
#define DEEP_EP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DEEP_EP_HOST_DEVICE inline
#endif
