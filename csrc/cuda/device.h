// The one door from the ops to the CUDA kernels: a table of functions, as cpu/dispatch.h has for the CPU. No CUDA or
// torch header here: compiled with nvcc alone on one side, with torch on the other (cuda/launch.cpp).
#pragma once

#include "../cpu/dispatch.h"
#include "../persistent/plan.h"
#include "../stepwise/outputs.h"
#include "../stepwise/product.h"

namespace fusedrnn {

// Where a call runs. The kernels allocate nothing and wait for nothing.
struct CudaCall {
  void* stream;  // a cudaStream_t
  void* memory;  // device memory of the problem's `bytes`
  void (*product)(const Product& p, void* context);
  void* context;
  persistent::Gpu gpu;
  bool persistent;  // kernels for many steps, where there is one
  bool tf32;        // float32 products may round to TF32
};

struct CudaTable {
  int64_t (*forward_bytes[kMaxCells][kDTypes])(const ForwardProblem&);
  int64_t (*backward_bytes[kMaxCells][kDTypes])(const BackwardProblem&);
  // Null, or what the first launch that failed was told.
  const char* (*forward[kMaxCells][kDTypes])(const ForwardProblem&, const CudaCall&);
  const char* (*backward[kMaxCells][kDTypes])(const BackwardProblem&, const CudaCall&);
  // Whether there is a kernel for many steps, on the call's GPU.
  bool (*forward_persists[kMaxCells][kDTypes])(const ForwardProblem&, const CudaCall&);
  bool (*backward_persists[kMaxCells][kDTypes])(const BackwardProblem&, const CudaCall&);
  // Raises largest, on the device, by an output and the same in another place.
  const char* (*compare[kDTypes])(const Output& output, const void* other, Largest* largest, const CudaCall&);
  // Ten times the compute capability that the kernels for the current GPU were compiled for: less than the GPU's own
  // where it runs those of an older one. 0: there are none for it.
  int (*capability)();
};
extern const CudaTable kCudaTable;

}  // namespace fusedrnn
