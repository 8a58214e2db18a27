// CUDA's 16-bit types as elements of tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../stepwise/element.h"

namespace fusedrnn {

template <>
struct Element<__nv_bfloat16> {
  static constexpr DType kDType = DType::kBFloat16;
  FUSEDRNN_INLINE static float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  FUSEDRNN_INLINE static __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
};
template <>
struct Element<__half> {
  static constexpr DType kDType = DType::kFloat16;
  FUSEDRNN_INLINE static float widen(__half v) { return __half2float(v); }
  FUSEDRNN_INLINE static __half narrow(float v) { return __float2half_rn(v); }
};

}  // namespace fusedrnn
