// What regularizes the states at each step (StateNoise of problem.h), as the CPU kernels find it. Included after
// team.h.

// The part of a state that one sample keeps, from its direction's first column on; false: there is none.
template <class T>
struct Keep {
  const T* row;

  FUSEDRNN_INLINE explicit operator bool() const { return row; }
  // Of the n units from u on.
  FUSEDRNN_INLINE Vec<typename ComputeType<T>::Type> operator()(int64_t u, int64_t n) const {
    return load<typename ComputeType<T>::Type>(row + u, n);
  }
};

// Of one sample at one step.
template <class T>
struct RowNoise {
  Keep<T> h, c;
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
    return {{keep_h ? keep_h + r * keep_h_stride : nullptr}, {keep_c ? keep_c + r * keep_c_stride : nullptr}};
  }

 private:
  static const T* first_row(const RowView& of, const LayerSizes& z, const Item& item, int64_t t, int64_t width) {
    return of.data ? row_at<T>(of, z.offset, t, item.first) + item.d * width : nullptr;
  }
};
