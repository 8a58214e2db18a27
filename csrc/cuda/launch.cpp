// See launch.h. Compiled only with a torch for CUDA (setup.py).
#include "launch.h"

#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/Exceptions.h>
#include <c10/cuda/CUDAGuard.h>

#include "device.h"

namespace fusedrnn {
namespace {

struct Types {
  cudaDataType_t storage, compute;
  int64_t storage_bytes, compute_bytes;
  cublasComputeType_t sums;
};

Types types(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return {CUDA_R_64F, CUDA_R_64F, 8, 8, CUBLAS_COMPUTE_64F};
    case DType::kBFloat16: return {CUDA_R_16BF, CUDA_R_32F, 2, 4, CUBLAS_COMPUTE_32F};
    case DType::kFloat16: return {CUDA_R_16F, CUDA_R_32F, 2, 4, CUBLAS_COMPUTE_32F};
    default: return {CUDA_R_32F, CUDA_R_32F, 4, 4, CUBLAS_COMPUTE_32F};
  }
}

// Elements from the first of two matrices to the second.
int64_t distance(const void* const* x, int64_t bytes) {
  return (static_cast<const char*>(x[1]) - static_cast<const char*>(x[0])) / bytes;
}

// Row-major c = a b is column-major c^T = b^T a^T. Two products are one batched call where all three strides between
// them are positive or zero in one of the two orders; where not, two calls. Whether float32 products may round to TF32
// is the handle's mode, which torch sets by its own switch.
void multiply(const Product& p, void* context) {
  if (p.m == 0 || p.n == 0) return;
  const auto handle = static_cast<cublasHandle_t>(context);
  const Types of = types(p.dtype);
  int64_t sa = 0, sb = 0, sc = 0;
  int first = 0;
  if (p.count == 2) {
    sa = distance(p.a, of.storage_bytes);
    sb = distance(p.b, of.storage_bytes);
    sc = distance(p.c, p.c_compute ? of.compute_bytes : of.storage_bytes);
    if (sb < 0 || (sb == 0 && sc < 0)) first = 1, sa = -sa, sb = -sb, sc = -sc;
  }
  // The factors, in the type of the sums.
  const double one64 = 1, zero64 = 0;
  const float one32 = 1, zero32 = 0;
  const bool wide = p.dtype == DType::kFloat64;
  const void* alpha = wide ? static_cast<const void*>(&one64) : &one32;
  const void* beta = p.add ? alpha : wide ? static_cast<const void*>(&zero64) : &zero32;
  const auto call = [&](int at, int count) {
    TORCH_CUDABLAS_CHECK(cublasGemmStridedBatchedEx_64(
        handle, p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, p.n, p.m, p.k,
        alpha, p.b[at], of.storage, std::max<int64_t>(p.ldb, 1), sb, p.a[at], of.storage, std::max<int64_t>(p.lda, 1),
        sa, beta, p.c[at], p.c_compute ? of.compute : of.storage, std::max<int64_t>(p.ldc, 1), sc, count, of.sums,
        CUBLAS_GEMM_DEFAULT));
  };
  if (sa < 0 || sc < 0) {
    sa = sb = sc = 0;
    call(0, 1);
    call(1, 1);
  } else {
    call(first, p.count);
  }
}

template <class Bytes, class Pass, class Problem>
void run(const Layer& layer, const Problem& p, const Bytes& bytes, const Pass& pass) {
  const c10::cuda::CUDAGuard guard(layer.x.device());
  const int dtype = layer.kernel_dtype();
  const at::Tensor memory = at::empty({bytes[layer.cell][dtype](p)}, layer.x.options().dtype(at::kByte));
  const CudaCall call = {at::cuda::getCurrentCUDAStream().stream(), memory.mutable_data_ptr(), multiply,
                         at::cuda::getCurrentCUDABlasHandle()};
  const char* error = pass[layer.cell][dtype](p, call);
  TORCH_CHECK(!error, "fusedrnn: a CUDA kernel could not be launched: ", error);
}

}  // namespace

void cuda_forward(const Layer& layer, const ForwardProblem& p) {
  run(layer, p, kCudaTable.forward_bytes, kCudaTable.forward);
}

void cuda_backward(const Layer& layer, const BackwardProblem& p) {
  run(layer, p, kCudaTable.backward_bytes, kCudaTable.backward);
}

}  // namespace fusedrnn
