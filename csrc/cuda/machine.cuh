// The GPU as the persistent kernels see it: each member a line of CUDA or PTX. What each promises:
// persistent/emulator.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../persistent/products.h"
#include "element.cuh"

namespace fusedrnn::persistent {

template <int kBlocks>
class GpuThread {
 public:
  FUSEDRNN_KERNEL explicit GpuThread(char* memory) : memory_(memory) {}
  FUSEDRNN_KERNEL int thread() const { return threadIdx.x; }
  FUSEDRNN_KERNEL int rank() const { return kBlocks == 1 ? 0 : blockIdx.x % kBlocks; }  // clusters lie along x
  FUSEDRNN_KERNEL int cluster() const { return blockIdx.x / kBlocks; }
  FUSEDRNN_KERNEL int slot() const { return blockIdx.y; }

  template <class E>
  FUSEDRNN_KERNEL E* shared(int bytes) const {
    return reinterpret_cast<E*>(memory_ + bytes);
  }
  template <class E, class F>
  FUSEDRNN_KERNEL E* as(F* place) const {
    return reinterpret_cast<E*>(place);
  }
  template <class E>
  FUSEDRNN_KERNEL E load(const E* place) const {
    return *place;
  }
  template <class E>
  FUSEDRNN_KERNEL void store(E* place, E value) const {
    *place = value;
  }
  FUSEDRNN_KERNEL Quad load_quad(const uint32_t* place) const {
    const uint4 v = *reinterpret_cast<const uint4*>(place);
    return {{v.x, v.y, v.z, v.w}};
  }
  FUSEDRNN_KERNEL void store_quad(uint32_t* place, const Quad& v) const {
    *reinterpret_cast<uint4*>(place) = make_uint4(v.r[0], v.r[1], v.r[2], v.r[3]);
  }
  template <class E>
  FUSEDRNN_KERNEL void store_everywhere(E* place, E value) const {
    static_assert(sizeof(E) == 4, "one register");
    if constexpr (kBlocks == 1) {
      *place = value;
    } else {
      uint32_t bits;
      memcpy(&bits, &value, sizeof bits);
      const uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(place));
#pragma unroll
      for (int rank = 0; rank < kBlocks; ++rank) {
        uint32_t there;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(bits) : "memory");
      }
    }
  }
  FUSEDRNN_KERNEL float shuffle_xor(float v, int mask) const { return __shfl_xor_sync(0xffffffffu, v, mask); }

  FUSEDRNN_KERNEL void multiply_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                       __nv_bfloat16) const {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  FUSEDRNN_KERNEL void multiply_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) const {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  FUSEDRNN_KERNEL void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }

  FUSEDRNN_KERNEL void converge() const { __syncwarp(); }
  FUSEDRNN_KERNEL void group_sync(int group, int threads) const {
    asm volatile("barrier.sync %0, %1;" ::"r"(group + 1), "r"(threads) : "memory");  // 0 is __syncthreads
  }
  FUSEDRNN_KERNEL void cluster_arrive() const {
    if constexpr (kBlocks > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  }
  FUSEDRNN_KERNEL void cluster_wait() const {
    if constexpr (kBlocks > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    else __syncthreads();
  }

 private:
  char* const memory_;
};

}  // namespace fusedrnn::persistent
