// What regularizes the states at each step (StateNoise of problem.h), as the CPU kernels find it. Included after
// team.h.

// Of one sample at one step, from its direction's first column on. Null: none.
template <class T>
struct RowNoise {
  using S = typename ComputeType<T>::Type;
  using V = Vec<S>;
  const T *keep_h, *keep_c;  // [R], [H]

  // zoneout (rules.h) of the n units from u on; `previous` points to the state before, `cell` is what the cell gives.
  FUSEDRNN_INLINE V h(int64_t u, int64_t n, const S* previous, V cell) const {
    return keep_h ? zoneout(load<S>(keep_h + u, n), load(previous + u), cell) : cell;
  }
  FUSEDRNN_INLINE V c(int64_t u, int64_t n, const S* previous, V cell) const {
    return keep_c ? zoneout(load<S>(keep_c + u, n), load(previous + u), cell) : cell;
  }
  // zoneout_backward
  FUSEDRNN_INLINE V past_h(int64_t u, int64_t n, V& d) const {
    return keep_h ? zoneout_backward(load<S>(keep_h + u, n), d) : V(0);
  }
  FUSEDRNN_INLINE V past_c(int64_t u, int64_t n, V& d) const {
    return keep_c ? zoneout_backward(load<S>(keep_c + u, n), d) : V(0);
  }
  FUSEDRNN_INLINE bool changes_h() const { return keep_h; }
  FUSEDRNN_INLINE bool changes_c() const { return keep_c; }
};

// Of an item's samples at step t.
template <class T>
struct StepNoise {
  const T *keep_h, *keep_c;
  int64_t keep_h_stride, keep_c_stride;

  StepNoise(const StateNoise& noise, const LayerSizes& z, const Item& item, int64_t t)
      : keep_h(first_row(noise.keep_h, z, item, t, z.R)), keep_c(first_row(noise.keep_c, z, item, t, z.H)),
        keep_h_stride(noise.keep_h.batch), keep_c_stride(noise.keep_c.batch) {}

  FUSEDRNN_INLINE RowNoise<T> row(int64_t r) const {
    return {keep_h ? keep_h + r * keep_h_stride : nullptr, keep_c ? keep_c + r * keep_c_stride : nullptr};
  }

 private:
  static const T* first_row(const RowView& of, const LayerSizes& z, const Item& item, int64_t t, int64_t width) {
    return of.data ? row_at<T>(of, z.offset, t, item.first) + item.d * width : nullptr;
  }
};
