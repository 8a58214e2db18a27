// Layer normalisation of a row (cells/layer_norm.h) that one thread has whole. Included after functions.h.

// The sum of at(i) over n values, where at gives the lanes from i on, zero past the last value.
template <class V, class At>
FUSEDRNN_INLINE typename V::Scalar sum_of_row(int64_t n, const At& at) {
  V sum(0);
  for (int64_t i = 0; i < n; i += V::kLanes) sum = sum + at(i);
  return sum_of_lanes(sum);
}

// In place; returns what it was normalised by.
template <class S>
FUSEDRNN_INLINE Moments<S> normalise_row(S* row, int64_t n) {
  using V = Vec<S>;
  const auto value = [&](int64_t i) FUSEDRNN_INLINE_LAMBDA { return load<S>(row + i, n - i); };
  const S mean = mean_of(sum_of_row<V>(n, value), n);
  const S squares = sum_of_row<V>(n, [&](int64_t i) FUSEDRNN_INLINE_LAMBDA {
    const V d = first_lanes(without_mean(value(i), V(mean)), n - i);
    return d * d;
  });
  const S scale = scale_of_squares(squares, n);
  for (int64_t i = 0; i < n; i += V::kLanes) store(row + i, normalised(value(i), V(mean), V(scale)), n - i);
  return {mean, scale};
}
