// The stepwise driver: one recurrent layer as matrix products and one element-wise kernel a time step, forward in
// loop_forward.h, backward in loop_backward.h; here is what both share. Written once, for any device that can
// run a body over elements and make a product:
//
//   device.each(slots, rows, columns, body)   body(s, row, column) for all of them (step.h)
//   device.each_block(slots, rows, body)      body(block, slot, row) for all rows, a block of threads each
//   (row_stage.h) device.product(p)                         product.h Device::kProjectionBytes                  memory
//   for input products of several steps device.persists<Pass>(problem)            whether it runs many steps as one
//   kernel, where one can (persistent/) device.run_steps<Cell>(span)              that kernel (persistent/span.h)
//
// in this order, each after the one before. On the GPU (device.cu) both only enqueue; nothing here reads a result. The
// input products of all steps are one product before the loop, unless they take more than kProjectionBytes; the weight
// gradients one after it. Both directions take each step side by side: a slot is a direction.
#pragma once

#include <algorithm>

#include "product.h"
#include "slots.h"
#include "step.h"

namespace fusedrnn {

// Cuts a block of memory into arrays; with no block it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class E>
  E* take(int64_t count) {
    E* result = memory_ ? reinterpret_cast<E*>(memory_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(E)) + kAlign - 1) / kAlign * kAlign;
    return result;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlign = 256;
  char* memory_;
  int64_t used_ = 0;
};

// The products of all slots, rows[s] rows in slot s: one batched product where the rows are as many and no stride is
// negative, else one each. So what is asked of the device depends on the problem, never on addresses, and the same
// problem has the same bits.
template <class Device>
void product_of_rows(Device& device, const Slots& slots, const int64_t* rows, Product product) {
  product.m = rows[0];
  product.count = slots.count;
  if (slots.count == 1) product = one_of(product, 0);
  if (slots.count == 1 || (rows[0] == rows[1] && product.a_stride >= 0)) return device.product(product);
  for (int s = 0; s < slots.count; ++s) {
    Product one = one_of(product, s);
    one.m = rows[s];
    device.product(one);
  }
}

template <class E>
const E* typed(const void* p, int64_t offset = 0) {
  return p ? static_cast<const E*>(p) + offset : nullptr;
}
template <class E>
E* typed(void* p, int64_t offset = 0) {
  return p ? static_cast<E*>(p) + offset : nullptr;
}

// A weight of every slot, as the batched products read them: as it lies, or of two directions copied side by side.
template <class Device, class T, class Problem>
const T* side_by_side(Device& device, const Problem& p, const void* LayerWeights::* weight, T* copies, int64_t rows,
                      int64_t columns) {
  if (p.size.D == 1) return typed<T>(p.weights[0].*weight);
  const SideBySide<T> body = {rows, columns, {typed<T>(p.weights[0].*weight), typed<T>(p.weights[1].*weight)}, copies};
  device.each(2, rows, columns, body);
  return copies;
}

inline bool is_ragged(const LayerSizes& z) { return z.N != z.T * z.B; }

// size.active where the device can read it. As arguments of kernels: nothing on the host must outlive the call.
template <class Device>
void write_active(Device& device, const LayerSizes& z, int32_t* to) {
  for (int64_t begin = 0; begin < z.T; begin += Numbers::kMost) {
    const int64_t count = std::min<int64_t>(Numbers::kMost, z.T - begin);
    Numbers some = {{}, to + begin};
    std::copy_n(z.active + begin, count, some.values);
    device.each(1, 1, count, some);
  }
}

}  // namespace fusedrnn
