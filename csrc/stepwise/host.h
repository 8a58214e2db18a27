// The stepwise driver on the CPU, one element after the other: the same driver and bodies as on the GPU, for the tests
// of machines without one. No speed is meant.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../cells/registry.h"
#include "../cpu/dispatch.h"
#include "loop_backward.h"
#include "loop_forward.h"

namespace fusedrnn {

template <class T, DType dtype>
struct HostElement {
  static constexpr DType kDType = dtype;
  static float widen(T v) { return static_cast<float>(v); }
  static T narrow(float v) { return static_cast<T>(v); }
};
template <>
struct Element<c10::BFloat16> : HostElement<c10::BFloat16, DType::kBFloat16> {};
template <>
struct Element<c10::Half> : HostElement<c10::Half, DType::kFloat16> {};

template <class Pass, class Device>
bool run_on_host(const typename Pass::Problem& p, Device device) {
  void* memory = acquire_scratch(Pass::template bytes<Device>(p));
  if (!memory) return false;
  Pass::run(p, memory, device);
  release_scratch();
  return true;
}

struct Host {
  static constexpr int64_t kProjectionBytes = 4096;  // so little that tests meet several chunks

  template <class Body>
  void each(int slots, int64_t rows, int64_t columns, const Body& body) {
    for (int s = 0; s < slots; ++s) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < columns; ++column) body(s, row, column);
      }
    }
  }

  template <class Body>
  void each_block(int slots, int64_t rows, const Body& body) {
    for (int s = 0; s < slots; ++s) {
      for (int64_t row = 0; row < rows; ++row) body(OneThread(), s, row);
    }
  }

  void product(const Product& p) {
    for (int i = 0; i < p.count; ++i) {
      switch (p.dtype) {
        case DType::kFloat32: multiply<float>(one_of(p, i)); break;
        case DType::kFloat64: multiply<double>(one_of(p, i)); break;
        case DType::kBFloat16: multiply<c10::BFloat16>(one_of(p, i)); break;
        case DType::kFloat16: multiply<c10::Half>(one_of(p, i)); break;
      }
    }
  }

  template <class Pass>
  static bool compute(const typename Pass::Problem& p) {
    return run_on_host<Pass>(p, Host());
  }
  template <class Pass>
  bool persists(const typename Pass::Problem&) const {
    return false;
  }
  template <class Cell, class Span>
  void run_steps(const Span&) {}

  template <class T>
  void multiply(const Product& p) {
    using S = Compute<T>;
    const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
    for (int64_t row = 0; row < p.m; ++row) {
      for (int64_t column = 0; column < p.n; ++column) {
        double sum = 0;  // a plain float sum of many terms would be less exact than any BLAS
        for (int64_t k = 0; k < p.k; ++k) {
          sum += static_cast<double>(widen(a[p.a_transposed ? k * p.lda + row : row * p.lda + k])) *
                 widen(b[p.b_transposed ? column * p.ldb + k : k * p.ldb + column]);
        }
        const int64_t at = row * p.ldc + column;
        if (p.c_compute) {
          S& c = static_cast<S*>(p.c)[at];
          c = static_cast<S>(p.add ? c + sum : sum);
        } else {
          T& c = static_cast<T*>(p.c)[at];
          c = narrow<T>(static_cast<S>(p.add ? widen(c) + sum : sum));
        }
      }
    }
  }
};

// A device's kernels, of every cell and type, in the place of an instruction set's.
template <class Device, class... Cells>
KernelTable host_table(const char* name, CellList<Cells...>) {
  using c10::BFloat16, c10::Half;
  constexpr ForwardKernel kForward[][kDTypes] = {{Device::template compute<StepwiseForward<Cells, float>>,
                                                  Device::template compute<StepwiseForward<Cells, double>>,
                                                  Device::template compute<StepwiseForward<Cells, BFloat16>>,
                                                  Device::template compute<StepwiseForward<Cells, Half>>}...};
  constexpr BackwardKernel kBackward[][kDTypes] = {{Device::template compute<StepwiseBackward<Cells, float>>,
                                                    Device::template compute<StepwiseBackward<Cells, double>>,
                                                    Device::template compute<StepwiseBackward<Cells, BFloat16>>,
                                                    Device::template compute<StepwiseBackward<Cells, Half>>}...};
  KernelTable table = kTableBase;
  table.name = name;
  table.even_rows = true;
  std::copy_n(&kForward[0][0], sizeof...(Cells) * kDTypes, &table.forward[0][0]);
  std::copy_n(&kBackward[0][0], sizeof...(Cells) * kDTypes, &table.backward[0][0]);
  return table;
}

}  // namespace fusedrnn
