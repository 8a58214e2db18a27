// A matrix product as the stepwise road asks for it. Each device brings its own way of making one (Device::product).
#pragma once

#include <cstdint>

#include "../problem.h"

namespace fusedrnn {

// Row-major: c [m, n] = a [m, k] b [k, n], or c += that; `count` of them with the same sizes. a and b hold elements of
// `dtype`, c of the same or of its compute type (element.h), in which sums are made. Rows are lda, ldb, ldc elements
// apart.
struct Product {
  int64_t m, n, k;
  int count;
  DType dtype;
  const void* a[2];
  int64_t lda;
  bool a_transposed;  // a is stored as [k, m]
  const void* b[2];
  int64_t ldb;
  bool b_transposed;  // b is stored as [n, k]
  void* c[2];
  int64_t ldc;
  bool c_compute;  // c is of the compute type
  bool add;
};

}  // namespace fusedrnn
