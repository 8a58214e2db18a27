// The GPU as a backend: workspace and stream from torch, products from cuBLAS, everything else from device.h. Compiled
// only with a torch for CUDA (setup.py).
#include "../target.h"

#include <cublas_v2.h>
#include <cuda_runtime.h>
#define USE_CUDA  // torch declares what it has for CUDA
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <sstream>

#include "../backend.h"
#include "../cpu/added.h"
#include "../stepwise/settings.h"
#include "../stepwise/trial.h"
#include "device.h"

namespace fusedrnn {
namespace {

struct Types {
  cudaDataType_t storage, compute;
  cublasComputeType_t sums;
};

Types types(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return {CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F};
    case DType::kBFloat16: return {CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F};
    case DType::kFloat16: return {CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F};
    default: return {CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F};
  }
}

void check_cuda(cudaError_t error) {
  check(error == cudaSuccess, "fusedrnn: CUDA failed: ", cudaGetErrorString(error));
}

void check_cublas(cublasStatus_t status) {
  check(status == CUBLAS_STATUS_SUCCESS, "fusedrnn: cuBLAS failed with status ", static_cast<int>(status));
}

// Row-major c = a b is column-major c^T = b^T a^T.
void multiply(const Product& p, void* context) {
  if (p.m == 0 || p.n == 0) return;
  const Types of = types(p.dtype);
  // The factors, in the type of the sums.
  const double one64 = 1, zero64 = 0;
  const float one32 = 1, zero32 = 0;
  const bool wide = p.dtype == DType::kFloat64;
  const void* alpha = wide ? static_cast<const void*>(&one64) : &one32;
  const void* beta = p.add ? alpha : wide ? static_cast<const void*>(&zero64) : &zero32;
  check_cublas(cublasGemmStridedBatchedEx_64(
      static_cast<cublasHandle_t>(context), p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
      p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, p.n, p.m, p.k, alpha, p.b, of.storage, std::max<int64_t>(p.ldb, 1),
      p.b_stride, p.a, of.storage, std::max<int64_t>(p.lda, 1), p.a_stride, beta, p.c,
      p.c_compute ? of.compute : of.storage, std::max<int64_t>(p.ldc, 1), p.c_stride, p.count, of.sums,
      CUBLAS_GEMM_DEFAULT));
}

// What cuBLAS may round, while a call lasts. float32 products: to TF32, if it is the call's setting. Sums of 16-bit
// products: never, also where cuBLAS splits them and the result has 16 bits.
class Rounding {
 public:
  Rounding(cublasHandle_t handle, bool tf32) : handle_(handle) {
    check_cublas(cublasGetMathMode(handle_, &before_));
    const int products = tf32 ? CUBLAS_TF32_TENSOR_OP_MATH : CUBLAS_DEFAULT_MATH;
    const int mode = products | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    check_cublas(cublasSetMathMode(handle_, static_cast<cublasMath_t>(mode)));
  }
  ~Rounding() { cublasSetMathMode(handle_, before_); }
  Rounding(const Rounding&) = delete;
  Rounding& operator=(const Rounding&) = delete;

 private:
  cublasHandle_t handle_;
  cublasMath_t before_;
};

// The kernels of a layer's cell: a table, and its place there.
struct CudaKernels {
  const CudaTable& table;
  int place;
};
CudaKernels kernels_of(const Layer& layer) {
  if (layer.cell < cells()) return {kCudaTable, layer.cell};
  const CudaTable* const table = added_cell(layer.cell - cells()).cuda;
  check(table, "cell ", layer.constants().name, " was compiled without CUDA kernels: nvcc or a GPU was not found then");
  return {*table, 0};
}

// The current one, which a guard has set, as the kernels of a table see it.
persistent::Gpu gpu_of(int device, const CudaTable& table) {
  static std::mutex mutex;
  static std::map<std::pair<int, const CudaTable*>, persistent::Gpu> all;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair key(device, &table);
  if (const auto found = all.find(key); found != all.end()) return found->second;
  const int capability = table.capability();
  persistent::Gpu gpu = {capability / 10, capability % 10, 0};
  check_cuda(cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return all[key] = gpu;  // nothing is kept of one that does not tell
}

// A mark in a stream, to tell the time between two.
class Event {
 public:
  Event() { check_cuda(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) const { check_cuda(cudaEventRecord(event_, stream)); }
  double seconds_since(const Event& before) const {
    float milliseconds = 0;
    check_cuda(cudaEventSynchronize(event_));
    check_cuda(cudaEventElapsedTime(&milliseconds, before.event_, event_));
    return 1e-3 * milliseconds;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// A pass over a layer, as the tables have it.
template <class Problem>
struct Pass {
  const char* name;
  const CudaTable& table;
  int64_t (*bytes)(const Problem&);
  const char* (*run)(const Problem&, const CudaCall&);
  bool (*persists)(const Problem&, const CudaCall&);
};

std::string told(const char* error) { return error ? error : ""; }
std::string told(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

// Both ways of computing a call, as stepwise/trial.h measures them.
template <class Problem>
class CudaWays {
 public:
  CudaWays(const Pass<Problem>& pass, const CudaCall& call, Device device)
      : pass_(pass), call_(call), device_(device) {}

  bool can_persist(const Problem& p) const { return pass_.persists(p, call_); }
  std::string run(const Problem& p, Way way) const {
    const std::string error = told(pass_.run(p, by(way)));
    const std::string later = told(cudaStreamSynchronize(stream()));
    return error.empty() ? later : error;
  }
  double seconds(const Problem& p, Way way) const {
    const Event begin, end;
    begin.record(stream());
    const char* error = pass_.run(p, by(way));
    end.record(stream());
    check(!error, "fusedrnn: a CUDA kernel that ran before could not be launched: ", told(error));
    return end.seconds_since(begin);
  }
  void* memory(int64_t bytes) {
    const Tensor found = empty_if_there_is_memory(Sizes({bytes}), aoti_torch_dtype_uint8(), device_);
    if (!found.defined()) return nullptr;
    held_.push_back(found);
    return found.mutable_data();
  }
  Largest compare(const Output& output, const void* other) {
    auto* const largest = static_cast<Largest*>(memory(sizeof(Largest)));
    check_memory(largest);
    Largest found;
    check_cuda(cudaMemsetAsync(largest, 0, sizeof(Largest), stream()));
    const char* error = kCudaTable.compare[static_cast<int>(output.dtype)](output, other, largest, call_);
    check(!error, "fusedrnn: results could not be compared on the GPU: ", told(error));
    check_cuda(cudaMemcpyAsync(&found, largest, sizeof(Largest), cudaMemcpyDeviceToHost, stream()));
    check_cuda(cudaStreamSynchronize(stream()));
    return found;
  }

 private:
  cudaStream_t stream() const { return static_cast<cudaStream_t>(call_.stream); }
  CudaCall by(Way way) const {
    CudaCall call = call_;
    call.persistent = way == Way::kPersistent;
    return call;
  }

  const Pass<Problem>& pass_;
  const CudaCall& call_;
  const Device device_;
  Tensors held_;
};

// GPU, driver and libraries, which the times depend on.
std::string machine(int device) {
  cudaDeviceProp properties;
  int driver = 0, runtime = 0;
  check_cuda(cudaGetDeviceProperties(&properties, device));
  check_cuda(cudaDriverGetVersion(&driver));
  check_cuda(cudaRuntimeGetVersion(&runtime));
  std::ostringstream text;
  text << properties.name << ", driver " << driver << ", CUDA " << runtime << ", " << this_library();
  return text.str();
}

// Those of a GPU. What is to be told of them goes to torch's warnings.
Choices& choices_of(int device) {
  static std::mutex mutex;
  static std::map<int, Choices> all;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = all.find(device);
  return found != all.end() ? found->second : all.try_emplace(device, choices_file(), machine(device)).first->second;
}

bool is_captured(void* stream) {
  cudaStreamCaptureStatus status;
  check_cuda(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

template <class Problem>
Way way_of(const Layer& layer, const Problem& p, const Pass<Problem>& pass, const CudaCall& call, bool may_measure) {
  const Plan wish = plan();
  if (wish != Plan::kAuto) return wish == Plan::kPersistent ? Way::kPersistent : Way::kStepwise;
  const Device device = layer.x.device();
  Choices& choices = choices_of(device.index);
  CudaWays<Problem> ways(pass, call, device);
  const CellConstants& cell = layer.constants();
  const std::string kind = kind_of(cell.name, layer.dtype, call.tf32, p.size, pass.name);
  const bool may_wait = may_measure && !is_captured(call.stream);
  const Way way = way_for(choices, kind, p, cell, layer.dtype, call.tf32, may_wait, ways);
  for (const std::string& remark : choices.take_remarks()) {
    aoti_torch_warn(__func__, __FILE__, __LINE__, ("fusedrnn: " + remark).c_str());
  }
  return way;
}

template <class Problem>
void run(const Layer& layer, const Problem& p, const Pass<Problem>& pass) {
  const Device device = layer.x.device();
  const torch::stable::accelerator::DeviceGuard guard(device.index);
  const Tensor memory = empty(Sizes({pass.bytes(p)}), aoti_torch_dtype_uint8(), device);
  void *stream = nullptr, *handle = nullptr;
  const bool told = aoti_torch_get_current_cuda_stream(device.index, &stream) == AOTI_TORCH_SUCCESS &&
                    torch_get_current_cuda_blas_handle(&handle) == AOTI_TORCH_SUCCESS;
  check(told, "fusedrnn: torch gives no stream or no handle of cuBLAS on ", device);
  const auto [tf32, may_measure] = settings();
  const Rounding rounding(static_cast<cublasHandle_t>(handle), tf32);
  CudaCall call = {stream, memory.mutable_data(), multiply, handle, gpu_of(device.index, pass.table), false, tf32};
  call.persistent = way_of(layer, p, pass, call, may_measure) == Way::kPersistent;
  const char* error = pass.run(p, call);
  check(!error, "fusedrnn: a CUDA kernel could not be launched: ", error ? error : "");
}

void forward(const Layer& layer, const ForwardProblem& p) {
  const auto [table, cell] = kernels_of(layer);
  const int dtype = layer.kernel_dtype();
  run<ForwardProblem>(layer, p,
                      {"forward", table, table.forward_bytes[cell][dtype], table.forward[cell][dtype],
                       table.forward_persists[cell][dtype]});
}

void backward(const Layer& layer, const BackwardProblem& p) {
  const auto [table, cell] = kernels_of(layer);
  const int dtype = layer.kernel_dtype();
  run<BackwardProblem>(layer, p,
                       {"backward", table, table.backward_bytes[cell][dtype], table.backward[cell][dtype],
                        table.backward_persists[cell][dtype]});
}

}  // namespace

const Backend kCudaBackend = {false, true, true, false, [](int, int) { return true; }, forward, backward};

}  // namespace fusedrnn
