// A matrix product as the stepwise driver asks for it. Each device brings its own way of making one (Device::product).
#pragma once

#include <cstdint>

#include "../problem.h"

namespace fusedrnn {

// Row-major: c [m, n] = a [m, k] b [k, n], or c += that; `count` of them, `*_stride` elements apart, none negative. a
// and b hold elements of `dtype`, c of the same or of its compute type (element.h), in which sums are made. Rows are
// lda, ldb, ldc elements apart.
struct Product {
  int64_t m, n, k;
  int count;
  DType dtype;
  const void* a;
  int64_t lda, a_stride;
  bool a_transposed;  // a is stored as [k, m]
  const void* b;
  int64_t ldb, b_stride;
  bool b_transposed;  // b is stored as [n, k]
  void* c;
  int64_t ldc, c_stride;
  bool c_compute;  // c is of the compute type
  bool add;
};

constexpr int64_t storage_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
constexpr int64_t result_bytes(const Product& p) {
  return p.c_compute && storage_bytes(p.dtype) == 2 ? 4 : storage_bytes(p.dtype);
}

// The i-th of the products, by itself.
inline Product one_of(const Product& p, int i) {
  Product one = p;
  one.count = 1;
  one.a = static_cast<const char*>(p.a) + i * p.a_stride * storage_bytes(p.dtype);
  one.b = static_cast<const char*>(p.b) + i * p.b_stride * storage_bytes(p.dtype);
  one.c = static_cast<char*>(p.c) + i * p.c_stride * result_bytes(p);
  one.a_stride = one.b_stride = one.c_stride = 0;
  return one;
}

}  // namespace fusedrnn
