// The forward pass of a cell: what ForwardLoop leaves to it, and the table's functions. Included after forward.inl.
// Stores of vectors may alias everything: whatever the loops need of the object is copied to locals first.

template <class Cell, class Types>
class ForwardPass final : public ForwardLoop<Types> {
  using Loop = ForwardLoop<Types>;
  using Loop::kQuantized, Loop::kRounded, Loop::L;
  using Loop::ldh_, Loop::ldc_, Loop::ldo_, Loop::ldm_, Loop::pitch_;
  using Loop::number, Loop::quantize_h, Loop::weights, Loop::with_mask;
  using Loop::p_, Loop::z_, Loop::s_, Loop::b_, Loop::team_, Loop::units_, Loop::outputs_, Loop::by_row_;
  using typename Loop::E;
  using typename Loop::S;
  using typename Loop::Shared;
  using typename Loop::Sum;
  using typename Loop::T;
  using typename Loop::V;
  using typename Loop::W;
  static constexpr int G = Cell::kGates, F = Cell::kFirst, K = Cell::kSaved, Z = Cell::kStates,
                       kBeside = Z - 1;  // states besides h
  using Norms = NormsOf<Cell>;
  static constexpr bool kNorms = Norms::kAny;
  static constexpr bool kProduct = F > 0, kTwoStage = kProduct && F < G;
  static constexpr int kRest = kTwoStage ? G - F : 0;
  static_assert(K == 0 || K >= G, "the projection is written where the saved gates go");
  static_assert(!kTwoStage || Cell::kBound != Bound::kNone, "q has the scale of h");
  static constexpr CellConstants kConstants = constants_of<Cell>();

 public:
  static int64_t panel_bytes(const LayerSizes& size) { return Loop::panel_bytes(size, kConstants); }
  static bool run(const ForwardProblem& p) {
    return Loop::run(p, kConstants, [](const ForwardProblem& problem, const Shared& shared, int thread) {
      ForwardPass(problem, shared, thread).work();
    });
  }

 private:
  ForwardPass(const ForwardProblem& p, const Shared& shared, int thread) : Loop(p, shared, thread, Cell::kBound) {}

  void pack_matrices(int d) const override {
    const LayerWeights& w = p_.weights[d];
    this->template pack_weights<G>(d, w.w_ih, z_.H, z_.I, s_.w_ih[d]);
    if constexpr (kProduct) this->template pack_weights<F>(d, w.w_hh, z_.H, z_.R, s_.w_hh[d]);
    if constexpr (kTwoStage) this->template pack_weights<kRest>(d, rest_of(w.w_hh), z_.H, z_.R, s_.w_rest[d]);
    if (is_projected()) this->template pack_weights<1>(d, w.w_hr, z_.R, z_.H, s_.w_hr[d]);
  }
  void project(int d, int64_t rows) const override { this->template project_gates<G>(d, rows); }
  void step(const Item& item, int64_t t, int64_t row, int now) override;

  // Of a cell that never is, the compiler drops what only a projection needs.
  FUSEDRNN_INLINE bool is_projected() const { return Cell::kProjectable && z_.projected; }
  // The rows of W_hh that multiply q.
  const W* rest_of(const void* w_hh) const { return static_cast<const W*>(w_hh) + F * z_.H * z_.R; }
};

template <class Cell, class Types>
void ForwardPass<Cell, Types>::step(const Item& item, int64_t t, int64_t row, int now) {
  const Timed timed(Phase::kRecurrentProduct);
  const LayerWeights& w = p_.weights[item.d];
  const int64_t n = item.rows(t), H = z_.H, R = z_.R, ldh = ldh_, ldc = ldc_, ldo = ldo_, ldm = ldm_, ldy = z_.D * R;
  const int64_t pitch = pitch_;
  const bool projected = is_projected(), saving = p_.saved;
  const S *bias = s_.b_hh[item.d], *scales = s_.s_hh[item.d], *scales_hr = s_.s_hr[item.d];
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
  [[maybe_unused]] const bool by_row = by_row_;
  [[maybe_unused]] const float *h_scale = b_.int8.h_scale[now], *h_bad = b_.int8.h_bad[now];
  [[maybe_unused]] float *next_bad = b_.int8.h_bad[1 - now], *m_bad = b_.int8.m_bad;
  // The scale of a row of h; and of m, which is of h's size, or an LSTM's before its projection.
  const auto scale_of_h = [&](int64_t r) -> S {
    if constexpr (kQuantized) return h_scale[r] + h_bad[r];
    else return 1;
  };
  const auto scale_of_m = [&](int64_t r) -> S {
    if constexpr (kQuantized) return (kTwoStage ? h_scale[r] : kScaleOfOne) + m_bad[r];
    else return 1;
  };
  // Words end inside a row: what is past it stays zero. bad, scale: of the row, with int8 weights.
  const auto put_operand = [](E* to, V v, int64_t n, [[maybe_unused]] float* bad, [[maybe_unused]] float scale) {
    if constexpr (kQuantized) {
      if (__builtin_expect(has_nan(v, n), 0)) Int8Rows::mark(*bad);
      store(to, v * V(1 / scale), n);
    } else if constexpr (kRounded) {
      store(to, v, n);
    } else {
      store(to, v);
    }
  };
  const auto put_m = [&](int64_t r, int64_t u, V v) {
    float scale = 1, *bad = nullptr;
    if constexpr (kQuantized) scale = kTwoStage ? h_scale[r] : kScaleOfOne, bad = m_bad + r;
    put_operand(m + r * ldm + u, v, H - u, bad, scale);
  };
  // Gates [first, first + count) of a product, and their projections.
  const auto inputs = [&](int first, int count, int64_t r, int64_t u, const Sum* acc, int stride, Values<V, G>& x,
                          Values<V, G>& rec) {
    const S* gates = gate_row[r];
    const S row_scale = first ? scale_of_m(r) : scale_of_h(r);
    for (int g = first; g < first + count; ++g) {
      x[g] = load<S>(gates + g * pitch + u, pitch - u);
      rec[g] = number(acc[(g - first) * stride], scales + g * H + u, row_scale) + load(bias + g * H + u);
    }
  };
  const S* const w_unit = s_.w_unit[item.d];
  const auto parameters_of = [&](int64_t u) {
    return UnitParameters<Cell, V>::of([&](int k)
                                           FUSEDRNN_INLINE_LAMBDA { return load<S>(w_unit + k * H + u, H - u); });
  };
  // h_{t-1} as a product reads it, before it is rounded.
  const auto masked_h = [&](int64_t r, int64_t u) {
    return with_mask(mask ? mask + r * R : nullptr, u, load(h_prev + r * ldh + u));
  };
  // The states of a sample, and what becomes of them.
  const auto states = [&](int64_t r, int64_t u, Values<V, Z>& state) {
    state[0] = projected ? V(0) : kProduct ? load(h_prev + r * ldh + u) : masked_h(r, u);
    for (int k = 1; k < Z; ++k) state[k] = load(c + (r * kBeside + k - 1) * ldc + u);
  };
  const auto keep = [&](int64_t r, int64_t u, int first, int end, const Values<V, K>& saved) {
    if (!saving) return;
    for (int k = first; k < end; ++k) store(saved_row[r] + k * H + u, saved[k], H - u);
  };
  const auto put_c = [&](int64_t r, int64_t u, const Values<V, Z>& state) {
    for (int k = 1; k < Z; ++k) {
      S* const row = c + (r * kBeside + k - 1) * ldc + u;
      V next = state[k];
      if (const Keep<T> kept = noise.row(r).c; Z == 2 && kept) next = zoneout(kept(u, H - u), load(row), next);
      store(row, next);
      if (saving) store(saved_row[r] + (K + k - 1) * H + u, next, H - u);
    }
  };
  const auto put_h = [&](int64_t r, int64_t u, V h) {
    if (const Keep<T> kept = noise.row(r).h; kept) {
      if (K == 0 && saving) store(saved_row[r] + u, h, H - u);
      h = zoneout(kept(u, R - u), load(h_prev + r * ldh + u), h);
    }
    if constexpr (kQuantized) {
      if (!by_row) put_operand(operand_next + r * ldo + u, h, R - u, next_bad + r, kScaleOfOne);
    } else if (kRounded || mask) {
      put_operand(operand_next + r * ldo + u, with_mask(mask ? mask + r * R : nullptr, u, h), R - u, nullptr, 1);
    }
    store(h_next + r * ldh + u, h);
    store(y + r * ldy + u, h, R - u);
  };
  const auto put_output = [&](int64_t r, int64_t u, V h) {
    if (projected) put_m(r, u, h);
    else put_h(r, u, h);
  };

  const Range own_rows = part(n, team_.me, team_.members);
  if constexpr (kQuantized) {
    for (int64_t r = own_rows.begin; r < own_rows.end; ++r) b_.int8.h_scale[1 - now][r] = kScaleOfOne;
  }
  if constexpr (kTwoStage) {
    product<F>(weights(s_.w_hh[item.d], w.w_hh, H), Inner{R}, units_, {0, n}, h_row, nothing_expected,
               [&](int64_t r, int64_t v, const Sum* acc, int stride) {
                 const int64_t u = v * L;
                 S* gates = gate_row[r];
                 Values<V, G> x, rec;
                 Values<V, K> saved;
                 Values<V, Z> prev;
                 V q;
                 inputs(0, F, r, u, acc, stride, x, rec);
                 prev[0] = masked_h(r, u);
                 parameters_of(u).forward_first(x, rec, prev, saved, q);
                 for (int k = 0; k < F; ++k) store(gates + k * pitch + u, saved[k], pitch - u);
                 put_m(r, u, q);
               });
    team_.meet();
    product<kRest>(weights(s_.w_rest[item.d], rest_of(w.w_hh), H), Inner{R}, units_, {0, n}, m_row, expect,
                   [&](int64_t r, int64_t v, const Sum* acc, int stride) {
                     const int64_t u = v * L;
                     const S* gates = gate_row[r];
                     Values<V, G> x, rec;
                     Values<V, K> saved;
                     Values<V, Z> state;
                     for (int k = 0; k < F; ++k) saved[k] = load<S>(gates + k * pitch + u, pitch - u);
                     inputs(F, kRest, r, u, acc, stride, x, rec);
                     states(r, u, state);
                     parameters_of(u).forward(x, rec, state, saved);
                     put_h(r, u, state[0]);
                     keep(r, u, F, K, saved);
                   });
  } else if constexpr (kNorms) {
    const int64_t ld_rec = saving ? 0 : row_stride<S>(G * H), rec_at = (Norms::kOwnSaved + G) * H;
    const auto rec_row = [&](int64_t r) { return saving ? saved_row[r] + rec_at : b_.rec + r * ld_rec; };
    product<G>(weights(s_.w_hh[item.d], w.w_hh, H), Inner{R}, units_, {0, n}, h_row, nothing_expected,
               [&](int64_t r, int64_t v, const Sum* acc, int stride) {
                 S* rec = rec_row(r) + v * L;
                 const S row_scale = scale_of_h(r);
                 for (int g = 0; g < G; ++g) {
                   store(rec + g * H, number(acc[g * stride], scales + (g * H + v * L), row_scale), H - v * L);
                 }
               });
    team_.meet();
    const Timed timed_cells(Phase::kCell);
    const S *const w_unit_of = s_.w_unit[item.d], *const bias_ih = s_.b_ih[item.d];
    S* const late_row = b_.late;
    for (int64_t r = own_rows.begin; r < own_rows.end; ++r) {
      S *const x_row = gate_row[r], *const rec = rec_row(r);
      const Moments<S> of_rec = normalise_row(rec, G * H);
      if (saving) saved_row[r][(K + Z - 1) * H + Norms::kScaleOfRec] = of_rec.scale;
      for (int64_t u = 0; u < H; u += L) {
        const auto at = [&](const S* from, int k) FUSEDRNN_INLINE_LAMBDA { return load<S>(from + k * H + u, H - u); };
        Values<V, G> x, a;
        Values<V, K> saved;
        Values<V, Z> state;
        Values<V, Cell::kLate> late;
        for (int g = 0; g < G; ++g) {
          x[g] = with_gain(at(x_row, g), at(w_unit_of, Norms::kGainOfX + g), at(bias_ih, g));
          a[g] = with_gain(at(rec, g), at(w_unit_of, Norms::kGainOfRec + g), at(bias, g));
        }
        states(r, u, state);
        Cell::forward(x, a, state, saved, late);
        if constexpr (Norms::kOfState) {
          for (int i = 0; i < Cell::kLate; ++i) store(late_row + i * ldc + u, late[i], H - u);
          put_c(r, u, state);
        } else {
          Cell::finish(late, state, saved);
          put_h(r, u, state[0]);
        }
        keep(r, u, 0, Norms::kOwnSaved, saved);
      }
      if constexpr (Norms::kOfState) {
        S* const c_row = late_row + ldc;  // as the cell gave it
        const Moments<S> of_c = normalise_row(c_row, H);
        if (saving) {
          saved_row[r][(K + Z - 1) * H + Norms::kMeanOfState] = of_c.mean;
          saved_row[r][(K + Z - 1) * H + Norms::kScaleOfState] = of_c.scale;
        }
        for (int64_t u = 0; u < H; u += L) {
          const auto gain = [&](int k) FUSEDRNN_INLINE_LAMBDA { return load<S>(w_unit_of + k * H + u, H - u); };
          Values<V, K> saved;
          Values<V, Z> state;
          Values<V, Cell::kLate> late = {
              load<S>(late_row + u, H - u),
              with_gain(load<S>(c_row + u, H - u), gain(Norms::kGainOfState), gain(Norms::kBiasOfState))};
          states(r, u, state);
          Cell::finish(late, state, saved);
          put_h(r, u, state[0]);
        }
      }
    }
  } else {
    const auto first_half = [&](int64_t r, int64_t v, Sum* acc, int stride) {
      const int64_t u = v * L;
      Values<V, G> x, rec;
      Values<V, K> saved;
      Values<V, Z> state;
      inputs(0, G, r, u, acc, stride, x, rec);
      states(r, u, state);
      if constexpr (Cell::kLate > 0) {
        Values<V, Cell::kLate> late;
        parameters_of(u).forward(x, rec, state, saved, late);
        for (int i = 0; i < Cell::kLate; ++i) acc[i * stride].v = (WordsOf<E>)late[i].v;
        keep(r, u, 0, K - Cell::kSavedLate, saved);
      } else {
        parameters_of(u).forward(x, rec, state, saved);
        put_output(r, u, state[0]);
        keep(r, u, 0, K, saved);
      }
      if constexpr (Z > 1) put_c(r, u, state);
    };
    const auto hidden = [&](const auto& second) {
      const Inner inner{kProduct ? R : 0};
      product<G>(weights(s_.w_hh[item.d], w.w_hh, H), inner, units_, {0, n}, h_row, expect, first_half, second);
    };
    if constexpr (Cell::kLate > 0) {
      hidden([&](int64_t r, int64_t v, const Sum* acc, int stride) {
        const int64_t u = v * L;
        Values<V, Cell::kLate> late;
        Values<V, K> saved;
        Values<V, Z> state;
        for (int i = 0; i < Cell::kLate; ++i) late[i].v = (typename V::Type)acc[i * stride].v;
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
                 [&](int64_t r, int64_t v, const Sum* acc, int) {
                   put_h(r, v * L, number(acc[0], scales_hr + v * L, scale_of_m(r)));
                 });
    }
  }
  team_.meet();
  if constexpr (kQuantized) {
    if (!by_row) return;
    for (int64_t r = own_rows.begin; r < own_rows.end; ++r) quantize_h(1 - now, r);
    team_.meet();
  }
}
