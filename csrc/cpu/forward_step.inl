// What ForwardPass does between two meetings: the input projection of a chunk, and one time step. Included after
// forward.inl. Stores of vectors may alias everything: whatever the loops need of the object is copied to locals first.

template <class Cell, class T>
void ForwardPass<Cell, T>::project(int d, int64_t rows) const {
  const Timed timed(Phase::kInputProduct);
  const int64_t H = z_.H, pitch = pitch_;
  const S* bias = s_.b_ih[d];
  const E* const* x_row = b_.x_row;
  S* const* gate_row = b_.gate_row;
  product<G>(
      weights(s_.w_ih[d], p_.weights[d].w_ih, H), Inner{z_.I}, units_, {0, rows}, [&](int64_t r) { return x_row[r]; },
      [&](int64_t r, int64_t u, int64_t n) FUSEDRNN_INLINE_LAMBDA {
        for (int g = 0; g < G; ++g) prefetch_to_write(gate_row[r] + g * pitch + u, n);
      },
      [&](int64_t r, int64_t v, const V* acc, int stride) {
        const int64_t u = v * L;
        S* gates = gate_row[r] + u;
        for (int g = 0; g < G; ++g) store(gates + g * pitch, acc[g * stride] + load(bias + g * H + u), pitch - u);
      });
}

// One time step of the rows [row, row + n) of the chunk: h[now] in, the other h out.
template <class Cell, class T>
void ForwardPass<Cell, T>::step(const Item& item, int64_t t, int64_t row, int now) {
  const Timed timed(Phase::kRecurrentProduct);
  const LayerWeights& w = p_.weights[item.d];
  const int64_t n = item.rows(t), H = z_.H, R = z_.R, ldh = ldh_, ldc = ldc_, ldo = ldo_, ldm = ldm_, ldy = z_.D * R;
  const int64_t pitch = pitch_;
  const bool projected = z_.projected, saving = p_.saved;
  const S* bias = s_.b_hh[item.d];
  T* y = static_cast<T*>(p_.y) + (z_.offset[t] + item.first) * ldy + item.d * R;
  const S* h_prev = b_.h[now];
  const E* operand = b_.operand[now];
  S *h_next = b_.h[1 - now], *c = b_.c;
  E *operand_next = b_.operand[1 - now], *m = b_.m;
  const T* mask = p_.noise.mask_h ? static_cast<const T*>(p_.noise.mask_h) + (item.d * z_.B + item.first) * R : nullptr;
  const StepNoise<T> noise(p_.noise, z_, item, t);
  S* const* gate_row = b_.gate_row + row;
  S* const* saved_row = b_.saved_row + row;

  const auto h_row = [&](int64_t r) { return operand + r * ldo; };
  const auto m_row = [&](int64_t r) { return m + r * ldm; };
  const auto expect = [&](int64_t r, int64_t u, int64_t n) FUSEDRNN_INLINE_LAMBDA {
    if (saving) {
      for (int k = G; k < K + Z - 1; ++k) prefetch_to_write(saved_row[r] + k * H + u, n);
    }
    if (!projected) prefetch_to_write(y + r * ldy + u, n);
  };
  // Words end inside a row: what is past it stays zero.
  const auto put_operand = [](E* to, V v, int64_t n) {
    if constexpr (kRounded) store(to, v, n);
    else store(to, v);
  };
  // Gates [first, first + count) of a product, and their projections.
  const auto inputs = [&](int first, int count, const S* gates, int64_t u, const V* acc, int stride, Values<V, G>& x,
                          Values<V, G>& rec) {
    for (int g = first; g < first + count; ++g) {
      x[g] = load<S>(gates + g * pitch + u, pitch - u);
      rec[g] = acc[(g - first) * stride] + load(bias + g * H + u);
    }
  };
  // The states of a sample, and what becomes of them.
  const auto states = [&](int64_t r, int64_t u, Values<V, Z>& state) {
    state[0] = projected ? V(0) : load(h_prev + r * ldh + u);
    if constexpr (Z > 1) state[1] = load(c + r * ldc + u);
  };
  const auto keep = [&](int64_t r, int64_t u, int first, int end, const Values<V, K>& saved) {
    if (!saving) return;
    for (int k = first; k < end; ++k) store(saved_row[r] + k * H + u, saved[k], H - u);
  };
  const auto put_c = [&](int64_t r, int64_t u, V next) {
    if (const Keep<T> kept = noise.row(r).c; kept) next = zoneout(kept(u, H - u), load(c + r * ldc + u), next);
    store(c + r * ldc + u, next);
    if (saving) store(saved_row[r] + K * H + u, next, H - u);
  };
  const auto put_h = [&](int64_t r, int64_t u, V h) {
    if (const Keep<T> kept = noise.row(r).h; kept) {
      if (K == 0 && saving) store(saved_row[r] + u, h, H - u);
      h = zoneout(kept(u, R - u), load(h_prev + r * ldh + u), h);
    }
    if (kRounded || mask)
      put_operand(operand_next + r * ldo + u, with_mask(mask ? mask + r * R : nullptr, u, h), R - u);
    store(h_next + r * ldh + u, h);
    store(y + r * ldy + u, h, R - u);
  };
  const auto put_output = [&](int64_t r, int64_t u, V h) {
    if (projected) put_operand(m + r * ldm + u, h, H - u);
    else put_h(r, u, h);
  };

  if constexpr (kTwoStage) {
    product<F>(weights(s_.w_hh[item.d], w.w_hh, H), Inner{R}, units_, {0, n}, h_row, nothing_expected,
               [&](int64_t r, int64_t v, const V* acc, int stride) {
                 const int64_t u = v * L;
                 S* gates = gate_row[r];
                 Values<V, G> x, rec;
                 Values<V, K> saved;
                 Values<V, Z> prev;
                 V q;
                 inputs(0, F, gates, u, acc, stride, x, rec);
                 prev[0] = with_mask(mask ? mask + r * R : nullptr, u, load(h_prev + r * ldh + u));
                 Cell::forward_first(x, rec, prev, saved, q);
                 for (int k = 0; k < F; ++k) store(gates + k * pitch + u, saved[k], pitch - u);
                 put_operand(m + r * ldm + u, q, H - u);
               });
    team_.meet();
    product<G - F>(weights(s_.w_rest[item.d], rest_of(w.w_hh), H), Inner{R}, units_, {0, n}, m_row, expect,
                   [&](int64_t r, int64_t v, const V* acc, int stride) {
                     const int64_t u = v * L;
                     const S* gates = gate_row[r];
                     Values<V, G> x, rec;
                     Values<V, K> saved;
                     Values<V, Z> state;
                     for (int k = 0; k < F; ++k) saved[k] = load<S>(gates + k * pitch + u, pitch - u);
                     inputs(F, G - F, gates, u, acc, stride, x, rec);
                     states(r, u, state);
                     Cell::forward(x, rec, state, saved);
                     put_h(r, u, state[0]);
                     keep(r, u, F, K, saved);
                   });
  } else {
    const auto first_half = [&](int64_t r, int64_t v, V* acc, int stride) {
      const int64_t u = v * L;
      Values<V, G> x, rec;
      Values<V, K> saved;
      Values<V, Z> state;
      inputs(0, G, gate_row[r], u, acc, stride, x, rec);
      states(r, u, state);
      if constexpr (Cell::kLate > 0) {
        Values<V, Cell::kLate> late;
        Cell::forward(x, rec, state, saved, late);
        for (int i = 0; i < Cell::kLate; ++i) acc[i * stride] = late[i];
        keep(r, u, 0, K - Cell::kSavedLate, saved);
      } else {
        Cell::forward(x, rec, state, saved);
        put_output(r, u, state[0]);
        keep(r, u, 0, K, saved);
      }
      if constexpr (Z > 1) put_c(r, u, state[1]);
    };
    const auto hidden = [&](const auto& second) {
      product<G>(weights(s_.w_hh[item.d], w.w_hh, H), Inner{R}, units_, {0, n}, h_row, expect, first_half, second);
    };
    if constexpr (Cell::kLate > 0) {
      hidden([&](int64_t r, int64_t v, const V* acc, int stride) {
        const int64_t u = v * L;
        Values<V, Cell::kLate> late;
        Values<V, K> saved;
        Values<V, Z> state;
        for (int i = 0; i < Cell::kLate; ++i) late[i] = acc[i * stride];
        states(r, u, state);
        Cell::finish(late, state, saved);
        put_output(r, u, state[0]);
        keep(r, u, K - Cell::kSavedLate, K, saved);
      });
    } else {
      hidden(nothing_more);
    }
    if (projected) {
      team_.meet();
      product<1>(weights(s_.w_hr[item.d], w.w_hr, R), Inner{H}, outputs_, {0, n}, m_row, nothing_expected,
                 [&](int64_t r, int64_t v, const V* acc, int) { put_h(r, v * L, acc[0]); });
    }
  }
  team_.meet();
}
