// The GPU as a backend: workspace and stream from torch, products from cuBLAS, everything else from device.h. Compiled
// only with a torch for CUDA (setup.py).
#include "../target.h"

#include <cublas_v2.h>
#include <cuda_runtime.h>
#define USE_CUDA  // torch declares what it has for CUDA
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <string_view>

#include "../backend.h"
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

void check_cublas(cublasStatus_t status) {
  check(status == CUBLAS_STATUS_SUCCESS, "fusedrnn: cuBLAS failed with status ", static_cast<int>(status));
}

// Row-major c = a b is column-major c^T = b^T a^T. Whether float32 products may round to TF32 is the handle's mode,
// which torch sets by its own switch.
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

// Sums of 16-bit products stay in float32 also where cuBLAS splits them and the result has 16 bits.
class WideSums {
 public:
  explicit WideSums(cublasHandle_t handle) : handle_(handle) {
    check_cublas(cublasGetMathMode(handle_, &before_));
    const int mode = before_ | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    check_cublas(cublasSetMathMode(handle_, static_cast<cublasMath_t>(mode)));
  }
  ~WideSums() { cublasSetMathMode(handle_, before_); }
  WideSums(const WideSums&) = delete;
  WideSums& operator=(const WideSums&) = delete;

 private:
  cublasHandle_t handle_;
  cublasMath_t before_;
};

persistent::Gpu gpu_of(int device) {
  persistent::Gpu gpu = {};
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
    check(error == cudaSuccess, "fusedrnn: CUDA does not tell what GPU it is: ", cudaGetErrorString(error));
  };
  ask(gpu.major, cudaDevAttrComputeCapabilityMajor);
  ask(gpu.minor, cudaDevAttrComputeCapabilityMinor);
  ask(gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return gpu;
}

bool persistent_wanted() {
  const char* plan = std::getenv("FUSEDRNN_CUDA_PLAN");
  const std::string_view wish = plan && *plan ? plan : "stepwise";
  check(wish == "stepwise" || wish == "persistent", "FUSEDRNN_CUDA_PLAN must be stepwise or persistent, got '", wish,
        "'");
  return wish == "persistent";
}

bool rounds_to_tf32(cublasHandle_t handle) {
  cublasMath_t mode;
  check_cublas(cublasGetMathMode(handle, &mode));
  return mode & CUBLAS_TF32_TENSOR_OP_MATH;
}

template <class Bytes, class Pass, class Problem>
void run(const Layer& layer, const Problem& p, const Bytes& bytes, const Pass& pass) {
  const Device device = layer.x.device();
  const torch::stable::accelerator::DeviceGuard guard(device.index);
  const int dtype = layer.kernel_dtype();
  const Tensor memory = empty(Sizes({bytes[layer.cell][dtype](p)}), aoti_torch_dtype_uint8(), device);
  void *stream = nullptr, *handle = nullptr;
  const bool told = aoti_torch_get_current_cuda_stream(device.index, &stream) == AOTI_TORCH_SUCCESS &&
                    torch_get_current_cuda_blas_handle(&handle) == AOTI_TORCH_SUCCESS;
  check(told, "fusedrnn: torch gives no stream or no handle of cuBLAS on ", device);
  const bool tf32 = rounds_to_tf32(static_cast<cublasHandle_t>(handle));
  const WideSums wide(static_cast<cublasHandle_t>(handle));
  const CudaCall call = {stream, memory.mutable_data(), multiply, handle, gpu_of(device.index), persistent_wanted(),
                         tf32};
  const char* error = pass[layer.cell][dtype](p, call);
  check(!error, "fusedrnn: a CUDA kernel could not be launched: ", error ? error : "");
}

void forward(const Layer& layer, const ForwardProblem& p) {
  run(layer, p, kCudaTable.forward_bytes, kCudaTable.forward);
}

void backward(const Layer& layer, const BackwardProblem& p) {
  run(layer, p, kCudaTable.backward_bytes, kCudaTable.backward);
}

}  // namespace

const Backend kCudaBackend = {false, true, true, [](int, int) { return true; }, forward, backward};

}  // namespace fusedrnn
