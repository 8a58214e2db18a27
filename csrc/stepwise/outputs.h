// What a pass writes, as a list: to give it other places, and to compare two passes over the same problem.
#pragma once

#include <vector>

#include "element.h"

namespace fusedrnn {

// Rows of `columns` elements, `stride` elements apart.
struct Output {
  void** at;  // the problem's member, which is not null
  int64_t rows, columns, stride;
  DType dtype;
};

class Outputs {
 public:
  Outputs(ForwardProblem& p, const CellConstants& cell, DType dtype) : compute_(compute_of(dtype)) {
    const LayerSizes& z = p.size;
    const int64_t own = (cell.saved + cell.states - 1) * z.H + cell.row_values;
    add(p.y, z.N, z.D * z.R, dtype);
    add(p.h_n, z.D * z.B, z.R, dtype);
    add(p.c_n, z.D * z.B, (cell.states - 1) * z.H, dtype);
    add(p.saved, z.D * z.N, own, compute_, p.saved_stride);
  }
  Outputs(BackwardProblem& p, const CellConstants& cell, DType dtype) : compute_(compute_of(dtype)) {
    const LayerSizes& z = p.size;
    add(p.dx, z.N, z.I, dtype);
    // On its way the sum of both directions (loop_backward.h), which may be dx itself.
    if (p.dx && p.dx_part[0] == p.dx) {
      same_as_first_ = &p.dx_part[0];
    } else if (p.dx_part[0]) {
      passing_ = {&p.dx_part[0], z.N, z.I, z.I, compute_};
    }
    add(p.dh0, z.D * z.B, z.R, dtype);
    add(p.dc0, z.D * z.B, (cell.states - 1) * z.H, dtype);
    add(p.dgates, z.D * z.N, cell.columns * z.H, compute_);
    add(p.dh, z.D * z.N, z.R, compute_);
    add(p.norms, z.D * z.N, 2 * cell.states + cell.gates, compute_);
    for (int d = 0; d < z.D && p.weight_gradients; ++d) {
      WeightGradients& dw = p.dw[d];
      add(dw.w_ih, cell.gates * z.H, z.I, dtype);
      add(dw.w_hh, cell.gates * z.H, z.R, dtype);
      add(dw.b_ih, 1, cell.gates * z.H, dtype);
      add(dw.b_hh, 1, cell.gates * z.H, dtype);
      add(dw.w_hr, z.R, z.H, dtype);
      add(dw.w_unit, 1, cell.parameters * z.H, dtype);
    }
  }

  // Memory for all that is written, and its place from then on.
  int64_t bytes() const {
    int64_t total = bytes_of(passing_);
    for (const Output& o : all_) total += bytes_of(o);
    return total;
  }
  void move_to(void* memory) {
    char* next = static_cast<char*>(memory);
    if (passing_.at) *passing_.at = next;
    next += bytes_of(passing_);
    for (const Output& o : all_) {
      *o.at = next;
      next += bytes_of(o);
    }
    if (same_as_first_ && !all_.empty()) *same_as_first_ = *all_.front().at;
  }
  const std::vector<Output>& all() const { return all_; }

 private:
  static DType compute_of(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }
  static int64_t bytes_of(const Output& o) {
    constexpr int64_t kAlign = 256;
    const int64_t element = o.dtype == DType::kFloat64 ? 8 : o.dtype == DType::kFloat32 ? 4 : 2;
    return (o.rows * o.stride * element + kAlign - 1) / kAlign * kAlign;
  }
  void add(void*& at, int64_t rows, int64_t columns, DType dtype, int64_t stride = 0) {
    if (at) all_.push_back({&at, rows, columns, stride ? stride : columns, dtype});
  }

  const DType compute_;
  std::vector<Output> all_;         // results
  Output passing_ = {};             // what is written and is none
  void** same_as_first_ = nullptr;  // another member of the first one's address
};

// Of an array the largest value, and the largest difference of another from it; not a number where one has none.
struct Largest {
  float value = 0, difference = 0;
};

}  // namespace fusedrnn
