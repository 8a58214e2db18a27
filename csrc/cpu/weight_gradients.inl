// The weight gradients of BackwardLoop: a product over all rows of a chunk, added to the item's sums while dG is still
// in cache, and the sum over the items of a direction at the end. Included after backward.inl.

// Where an item's weight gradients are summed.
template <class T>
typename BackwardLoop<T>::WeightSums BackwardLoop<T>::weight_sums(const Item& item, int index) const {
  const int64_t H = z_.H, I = z_.I, R = z_.R, G = cell_.gates;
  const WeightGradients& result = p_.dw[item.d];
  S* b = s_.db + index * cell_.columns * H;
  if (s_.direct) {
    return {static_cast<S*>(result.w_ih), static_cast<S*>(result.w_hh), static_cast<S*>(result.w_hr), b};
  }
  S* const w_hh = cell_.first ? s_.dw_hh + index * G * H * R : nullptr;
  return {s_.dw_ih + index * G * H * I, w_hh, s_.dw_hr + index * R * H, b};
}

// Each member clears its own rows: of the biases' sums, and of the others if no row comes that would begin them.
template <class T>
void BackwardLoop<T>::clear_weight_sums(const Item& item, int index, bool all) const {
  const WeightSums sum = weight_sums(item, index);
  const auto clear = [](S* from, int64_t n) {
    if (n > 0) __builtin_memset(from, 0, n * sizeof(S));  // there is no W_ih without an input
  };
  const int64_t u0 = units_.begin * L, un = min64(z_.H, units_.end * L) - u0;
  for (int c = 0; c < cell_.columns; ++c) clear(sum.b + c * z_.H + u0, un);
  for (int g = 0; g < cell_.gates && all; ++g) {
    clear(sum.w_ih + (g * z_.H + u0) * z_.I, un * z_.I);
    if (cell_.first) clear(sum.w_hh + (g * z_.H + u0) * z_.R, un * z_.R);
  }
  if (z_.projected && all) {
    const int64_t p0 = outputs_.begin * L, pn = min64(z_.R, outputs_.end * L) - p0;
    clear(sum.w_hr + p0 * z_.H, pn * z_.H);
  }
}

template <class T>
void BackwardLoop<T>::weight_gradients(const Item& item, int index, int64_t s0, int64_t s1, int64_t rows, bool add) {
  const Timed timed(Phase::kWeightGradient);
  const Range words = part(steps_of<E>(rows), team_.me, team_.members);
  gather_operands(item, s0, s1, {words.begin * kPair<E>, min64(rows, words.end * kPair<E>)});
  clear_operands({words.begin * kPair<E>, words.end * kPair<E>}, rows);
  team_.meet();
  const int64_t H = z_.H, I = z_.I, R = z_.R;
  const int64_t u0 = units_.begin * L, un = min64(H, units_.end * L) - u0;
  const WeightSums to = weight_sums(item, index);
  const int gates = cell_.gates, split = cell_.split, first = cell_.first;
  for (int g = 0; g < gates; ++g) {
    const E* dx = b_.dg_operand + (g < gates - split ? g : g + split) * gate_ + u0;
    const E* drec = b_.dg_operand + g * gate_ + u0;
    outer_product(dx, operand_ldg_, rows, un, b_.x, to.w_ih + (g * H + u0) * I, I, add);
    if (!first) continue;
    outer_product(drec, operand_ldg_, rows, un, g < first ? b_.h : b_.m, to.w_hh + (g * H + u0) * R, R, add);
  }
  if (z_.projected) {
    const int64_t p0 = outputs_.begin * L, pn = min64(R, outputs_.end * L) - p0;
    outer_product(b_.dh_operand + p0, operand_ldh_, rows, pn, b_.m, to.w_hr + p0 * H, H, add);
  }
  const Timed timed_biases(Phase::kBiasGradient);
  for (int c = cell_.norms ? cell_.factors() : 0; c < cell_.columns;
       ++c) {  // with norms no bias has the gradient of a product
    for (int64_t u = u0; u < u0 + un; u += L) {
      S* db = to.b + c * H + u;
      const V sum = pairwise_sum(b_.dg + c * H + u, rows);
      store(db, load<S>(db, H - u) + sum, H - u);
    }
  }
}

// Sum over rows of dG of the vector at `column`; its rounding error grows with the logarithm of the rows.
template <class T>
typename BackwardLoop<T>::V BackwardLoop<T>::pairwise_sum(const S* column, int64_t rows) const {
  if (rows > 16) {
    const int64_t half = rows / 2;
    return pairwise_sum(column, half) + pairwise_sum(column + half * ldg_, rows - half);
  }
  V sum(0);
  for (int64_t r = 0; r < rows; ++r) sum = sum + load(column + r * ldg_);
  return sum;
}

// The right operands of the chunk's weight gradients, row by row beside dG: x, h_{t-1}, and q or the unprojected
// output where the cell has them.
template <class T>
void BackwardLoop<T>::gather_operands(const Item& item, int64_t s0, int64_t s1, Range own) {
  const Timed timed(Phase::kGather);
  for_steps(item, s0, s1, own, [&](int64_t t, int64_t first, Range samples) {
    for (int64_t b = samples.begin; b < samples.end; ++b) {
      const int64_t r = first + b;
      const T* x = row_at<T>(p_.x, z_.offset, t, item.first + b);
      const Row& at = b_.rows[r];
      for (int64_t i = 0; i < z_.I; i += L) b_.x.put(r, i, load<S>(x + i, z_.I - i));
      const T* mask = mask_of(item, b);
      for (int64_t u = 0; cell_.first && u < z_.R; u += L) {
        b_.h.put(r, u, with_mask(mask, u, z_.R, previous_h(at, u, z_.R)));
      }
      if (cell_.second_gates() || z_.projected) put_second_operand(at, mask, r);
    }
  });
}

// Of these rows those past the chunk's last.
template <class T>
void BackwardLoop<T>::clear_operands(Range own, int64_t rows) {
  const auto clear = [](const Strips<E>& to, int64_t r) {
    for (int64_t i = 0; i < to.n; i += L) to.put(r, i, V(0));
  };
  for (int64_t r = max64(own.begin, ceil_div(rows, kPair<E>) * kPair<E>); r < own.end; r += kPair<E>) {
    clear(b_.x, r);
    if (cell_.first) clear(b_.h, r);
    if (cell_.second_gates() || z_.projected) clear(b_.m, r);
  }
}

// After all items: the slices' accumulators, added in order, into the results.
template <class T>
void BackwardLoop<T>::add_slices() {
  const Timed timed(Phase::kAddSlices);
  for (int d = 0; d < z_.D; ++d) {
    const WeightGradients& dw = p_.dw[d];
    const int64_t H = z_.H, G = cell_.gates, biases = cell_.columns * H;
    const S* db = s_.db + d * s_.plan.slices * biases;
    const S* const arguments = db + cell_.first_argument * H;
    const int other = cell_.gate_split;  // gates whose two biases have different gradients
    add_slices_of(arguments, biases, G * H, dw.b_hh);
    add_slices_of(arguments, biases, (G - other) * H, dw.b_ih);
    if (other && dw.b_ih) {
      add_slices_of(arguments + G * H, biases, other * H, static_cast<T*>(dw.b_ih) + (G - other) * H);
    }
    add_slices_of(db + cell_.factors() * H, biases, cell_.parameters * H, dw.w_unit);
    if (s_.direct) continue;
    const int64_t first = d * s_.plan.slices;
    add_slices_of(s_.dw_ih + first * G * H * z_.I, G * H * z_.I, G * H * z_.I, dw.w_ih);
    if (cell_.first) add_slices_of(s_.dw_hh + first * G * H * z_.R, G * H * z_.R, G * H * z_.R, dw.w_hh);
    if (z_.projected) add_slices_of(s_.dw_hr + first * z_.R * H, z_.R * H, z_.R * H, dw.w_hr);
  }
}

template <class T>
void BackwardLoop<T>::add_slices_of(const S* slices, int64_t stride, int64_t n, void* result) {
  if (!result) return;
  const Range own = part(ceil_div(n, L), thread_, s_.threads);
  for (int64_t i = own.begin * L; i < min64(n, own.end * L); i += L) {
    V sum = load<S>(slices + i, n - i);
    for (int k = 1; k < s_.plan.slices; ++k) sum = sum + load<S>(slices + k * stride + i, n - i);
    store(static_cast<T*>(result) + i, sum, n - i);
  }
}
