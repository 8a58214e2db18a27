// The backward pass of a cell with layer normalisation (cells/layer_norm.h): rows that one thread has whole. A step's
// product is made by units, then a team meets, and its members share the rows. Included after backward_step.inl.

// The cell of sample r, from dL/dh in `dh`: the gradients of the gates' arguments, then of the products.
template <class Cell, class T>
void BackwardPass<Cell, T>::row_backward(const Step& s, int64_t r) {
  const Row& at = s.rows[r];
  const int64_t H = s.H, n = G * H;
  const S* const x_row = at.saved + Norms::kOwnSaved * H;  // normalised
  const S* const rec_row = x_row + n;
  const S* const numbers = at.saved + (K + Z - 1) * H;
  const S *const w_unit = s.w_unit, *const dh_row = s.dh + r * s.ldh;
  S* const dg = s.dg + r * s.ldg;
  const auto gain = [&](int k, int64_t u) FUSEDRNN_INLINE_LAMBDA { return load<S>(w_unit + k * H + u, H - u); };
  const auto in_row = [&](const S* from, int k, int64_t u)
                          FUSEDRNN_INLINE_LAMBDA { return load<S>(from + k * H + u, H - u); };
  const auto saved_of = [&](int64_t u, Values<V, K>& saved) FUSEDRNN_INLINE_LAMBDA {
    for (int k = 0; k < Norms::kOwnSaved; ++k) saved[k] = in_row(at.saved, k, u);
  };
  // The normalised c; in cur[1] what the cell makes of it.
  const auto normed_c = [&](const auto& saved, int64_t u, Values<V, Z>& cur) FUSEDRNN_INLINE_LAMBDA {
    candidates(at, saved, cur, H, u);
    const V normed = normalised(cur[1], V(numbers[Norms::kMeanOfState]), V(numbers[Norms::kScaleOfState]));
    cur[1] = with_gain(normed, gain(Norms::kGainOfState, u), gain(Norms::kBiasOfState, u));
    return normed;
  };
  S mean_c = 0, product_c = 0;
  if constexpr (Norms::kOfState) {
    V sum(0), product(0);
    for (int64_t u = 0; u < H; u += L) {
      Values<V, K> saved;
      Values<V, Z> cur, d;
      saved_of(u, saved);
      d[0] = in_row(dh_row, 0, u);
      const V normed = normed_c(saved, u, cur);
      const V d_normed = Cell::normed_gradient(saved, cur, d);
      s.put(r, kFactors + Norms::kBiasOfState, u, d_normed);
      s.put(r, kFactors + Norms::kGainOfState, u, through_gain(d_normed, normed));
      const V through = through_gain(d_normed, gain(Norms::kGainOfState, u));
      sum = sum + through;
      product = product + through * normed;
    }
    mean_c = mean_of(sum_of_lanes(sum), H), product_c = mean_of(sum_of_lanes(product), H);
  }
  V sum_x(0), product_x(0), sum_rec(0), product_rec(0);
  for (int64_t u = 0; u < H; u += L) {
    Values<V, K> saved;
    Values<V, Z> prev, cur, d;
    Values<V, G> dx, drec;
    saved_of(u, saved);
    prev[0] = previous_h(at, u, s.R), cur[0] = in_row(dh_row, 0, u);  // no cell with norms reads cur[0]
    d[0] = in_row(dh_row, 0, u);
    V direct_c(0);
    if constexpr (Z > 1) {
      prev[1] = load<S>(at.c_prev + u, H - u);
      const V normed = normed_c(saved, u, cur);
      d[1] = load(s.carry_c + r * s.ldm + u);
      if (s.norms) store(s.sent_dc + r * s.ldm + u, d[1]);
      if (at.dc) d[1] = d[1] + load<S>(at.dc + u, H - u);
      const V all = d[1];
      if (at.noise.c) direct_c = zoneout_backward(at.noise.c(u, H - u), d[1]);
      const V through = through_gain(in_row(dg, kFactors + Norms::kBiasOfState, u), gain(Norms::kGainOfState, u));
      d[1] = d[1] + normalised_backward(through, normed, V(mean_c), V(product_c), V(numbers[Norms::kScaleOfState]));
      if (s.norms) store(s.all_dc + r * s.ldm + u, at.noise.c ? all : d[1]);
    }
    Cell::backward(saved, prev, cur, d, dx, drec);
    for (int g = 0; g < G; ++g) {
      const V x = in_row(x_row, g, u), rec = in_row(rec_row, g, u);
      const V d_x = through_gain(dx[g], gain(Norms::kGainOfX + g, u));
      const V d_rec = through_gain(drec[g], gain(Norms::kGainOfRec + g, u));
      s.put(r, Norms::kFirstArgument + g, u, drec[g]);
      if (g >= G - Norms::kGateSplit) s.put(r, Norms::argument(g), u, dx[g]);
      s.put(r, kFactors + Norms::kGainOfX + g, u, through_gain(dx[g], x));
      s.put(r, kFactors + Norms::kGainOfRec + g, u, through_gain(drec[g], rec));
      sum_x = sum_x + d_x, product_x = product_x + d_x * x;
      sum_rec = sum_rec + d_rec, product_rec = product_rec + d_rec * rec;
    }
    store(s.carry_h + r * s.ldh + u, load(s.carry_h + r * s.ldh + u) + d[0]);
    if constexpr (Z > 1) store(s.carry_c + r * s.ldm + u, s.limited(d[1] + direct_c));
  }
  const auto mean = [&](V sum) FUSEDRNN_INLINE_LAMBDA { return V(mean_of(sum_of_lanes(sum), n)); };
  const V mean_x = mean(sum_x), mean_product_x = mean(product_x), scale_x(numbers[Norms::kScaleOfX]);
  const V mean_rec = mean(sum_rec), mean_product_rec = mean(product_rec), scale_rec(numbers[Norms::kScaleOfRec]);
  for (int g = 0; g < G; ++g) {
    for (int64_t u = 0; u < H; u += L) {
      const V d_rec = through_gain(in_row(dg, Norms::kFirstArgument + g, u), gain(Norms::kGainOfRec + g, u));
      const V d_x = through_gain(in_row(dg, Norms::argument(g), u), gain(Norms::kGainOfX + g, u));
      const V rec = in_row(rec_row, g, u), x = in_row(x_row, g, u);
      s.put(r, g, u, normalised_backward(d_rec, rec, mean_rec, mean_product_rec, scale_rec));
      s.put(r, G + g, u, normalised_backward(d_x, x, mean_x, mean_product_x, scale_x));
    }
  }
}
