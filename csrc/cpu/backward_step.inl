// The backward pass of a cell: what BackwardLoop leaves to it, and the table's function. A step is the products with dG
// of the later step, and the cell's gradients. Included after backward.inl.

template <class Cell, class T>
class BackwardPass final : public BackwardLoop<T> {
  using Loop = BackwardLoop<T>;
  using Loop::kRounded, Loop::L;
  using Loop::ldg_, Loop::ldh_, Loop::ldm_, Loop::gate_, Loop::operand_ldg_, Loop::operand_ldh_;
  using Loop::limit, Loop::mask_of, Loop::previous_h, Loop::weights, Loop::with_mask;
  using Loop::p_, Loop::z_, Loop::s_, Loop::b_, Loop::team_, Loop::units_, Loop::outputs_;
  using typename Loop::E;
  using typename Loop::Row;
  using typename Loop::S;
  using typename Loop::Shared;
  using typename Loop::V;
  static constexpr int G = Cell::kGates, F = Cell::kFirst, K = Cell::kSaved, Z = Cell::kStates,
                       kBeside = Z - 1;  // states besides h
  static constexpr int kSplit = Cell::kSplit, kParameters = Cell::kParameters, kFactors = G + kSplit;
  using Norms = NormsOf<Cell>;
  static constexpr bool kNorms = Norms::kAny;
  static constexpr bool kProduct = F > 0, kTwoStage = kProduct && F < G;
  static constexpr int kRest = kTwoStage ? G - F : 0;
  static_assert(!kTwoStage || kSplit == 0, "the second stage's products read drec and dx as one");
  static constexpr CellConstants kConstants = constants_of<Cell>();

 public:
  static bool run(const BackwardProblem& p) {
    return Loop::run(p, kConstants, [](const BackwardProblem& problem, const Shared& shared, int thread) {
      BackwardPass(problem, shared, thread).work();
    });
  }

 private:
  using Loop::Loop;

  // Of a cell that never is, the compiler drops what only a projection needs.
  template <class Of>
  static constexpr bool is_projected(const Of& of) {
    return Cell::kProjectable && of.projected;
  }

  struct Step;
  void step(const Item& item, int64_t later_row, int64_t later, int64_t row, int64_t now, int64_t severed) override;
  void put_second_operand(const Row& at, const T* mask, int64_t r) const override;
  static void expect_saved(const Step& s, const Row& at, int64_t u, int64_t n);
  static void candidates(const Row& at, const Values<V, K>& saved, Values<V, Z>& cur, int64_t H, int64_t u);
  static void cell_backward(const Step& s, int64_t r, int64_t u, V dh, V direct);
  static void first_stage_backward(const Step& s, int64_t r, int64_t u, V dq);
  static void row_backward(const Step& s, int64_t r);  // row_stage.inl
};

// What the cells of a step read and write, by sample. A copy: stores of vectors may alias every member of the pass.
template <class Cell, class T>
struct BackwardPass<Cell, T>::Step {
  int64_t H, R, ldg, ldh, ldm, gate, operand_ldg, operand_ldh;
  bool projected, norms;
  S clip;  // of each element, or 0
  const Row* rows;
  const T* mask;  // [samples][R], or null
  S *dg, *dh, *sent_dh, *sent_dc, *all_dc;
  E *dg_operand, *dh_operand;
  S *carry_h, *carry_c;
  const S* w_unit;

  FUSEDRNN_INLINE V limited(V sent) const { return clip == 0 ? sent : clipped(sent, V(clip)); }
  FUSEDRNN_INLINE const T* mask_of(int64_t r) const { return mask ? mask + r * R : nullptr; }
  // Column k of dG, units from u on.
  FUSEDRNN_INLINE void put(int64_t r, int k, int64_t u, V v) const {
    store(dg + r * ldg + k * H + u, v, H - u);
    if (kRounded && k < kFactors) store(dg_operand + r * operand_ldg + k * gate + u, v, H - u);
  }
  FUSEDRNN_INLINE UnitParameters<Cell, V> parameters_of(int64_t u) const {
    return UnitParameters<Cell, V>::of([&](int k)
                                           FUSEDRNN_INLINE_LAMBDA { return load<S>(w_unit + k * H + u, H - u); });
  }
};

template <class Cell, class T>
void BackwardPass<Cell, T>::step(const Item& item, int64_t later_row, int64_t later, int64_t row, int64_t now,
                                 int64_t severed) {
  const Timed timed(Phase::kRecurrentProduct);
  // clang-format off
  const Step s{z_.H, z_.R, ldg_, ldh_, ldm_, gate_, operand_ldg_, operand_ldh_, is_projected(z_), p_.norms != nullptr,
               p_.clip_by_norm ? S(0) : static_cast<S>(p_.clip), b_.rows + row, mask_of(item, 0),
               b_.dg + row * ldg_, b_.dh + row * ldh_, b_.sent_dh + row * ldh_,
               b_.sent_dc + row * kBeside * ldm_, b_.all_dc + row * kBeside * ldm_,
               b_.dg_operand + row * operand_ldg_, b_.dh_operand + row * operand_ldh_, b_.carry_h, b_.carry_c,
               s_.w_unit[item.d]};
  // clang-format on
  const int d = item.d;
  const E* later_dg = b_.dg_operand + later_row * operand_ldg_;
  const int64_t both = min64(later, now);
  const auto w_hh = weights(s_.w_hh[d], p_.weights[d].w_hh, 0, s.R);
  const auto dg_row = [&](int64_t r) { return later_dg + r * s.operand_ldg; };
  const auto carried = [&](int64_t r, int64_t u) { return load(s.carry_h + r * s.ldh + u); };
  // What the step after sends: through the products and by the direct path.
  const auto sent = [&](int64_t r, int64_t v, V acc) {
    return s.limited(with_mask(s.mask_of(r), v * L, s.R, acc) + carried(r, v * L));
  };
  const auto take_dh = [&](int64_t r, int64_t u, V dh) {  // dL/dh_t but for dy: the cell, or the projection first
    const Row& at = s.rows[r];
    if (s.norms) store(s.sent_dh + r * s.ldh + u, dh);
    if (at.dy) dh = dh + load<S>(at.dy + u, s.R - u);
    const V direct = at.noise.h ? zoneout_backward(at.noise.h(u, s.R - u), dh) : V(0);
    if (is_projected(s)) {
      store(s.dh + r * s.ldh + u, dh);
      if constexpr (kRounded) store(s.dh_operand + r * s.operand_ldh + u, dh, s.R - u);
      store(s.carry_h + r * s.ldh + u, direct);
    } else if constexpr (kNorms) {
      store(s.dh + r * s.ldh + u, dh);
      store(s.carry_h + r * s.ldh + u, direct);
    } else {
      cell_backward(s, r, u, dh, direct);
    }
  };
  const Inner gates{F * s.gate};
  const auto expect = [&](int64_t r, int64_t u, int64_t n) FUSEDRNN_INLINE_LAMBDA {
    const Row& at = s.rows[r];
    if (at.dy) prefetch_to_read(at.dy + u, n);
    if (!is_projected(s)) expect_saved(s, at, u, n);
  };
  // Rows of what is sent are complete before the cell takes them, if they are clipped by norm or some send nothing.
  const bool apart = severed > 0 || p_.clip_by_norm;
  if (!apart) {
    product<1>(w_hh, gates, outputs_, {0, both}, dg_row, expect,
               [&](int64_t r, int64_t v, const V* acc, int) { take_dh(r, v * L, sent(r, v, acc[0])); });
  }
  product<1>(
      w_hh, gates, outputs_, {apart ? severed : both, later}, dg_row, nothing_expected,
      [&](int64_t r, int64_t v, const V* acc, int) { store(s.carry_h + r * s.ldh + v * L, sent(r, v, acc[0])); });
  if (p_.clip_by_norm) limit({severed, later});
  for (int64_t r = 0; r < severed; ++r) {
    for (int64_t v = outputs_.begin; v < outputs_.end; ++v) store(s.carry_h + r * s.ldh + v * L, V(0));
    for (int64_t i = r * kBeside; i < (r + 1) * kBeside; ++i) {
      for (int64_t v = units_.begin; v < units_.end; ++v) store(s.carry_c + i * s.ldm + v * L, V(0));
    }
  }
  for (int64_t v = outputs_.begin; v < outputs_.end; ++v) {
    for (int64_t r = apart ? 0 : both; r < now; ++r) take_dh(r, v * L, carried(r, v * L));
  }
  if (now == 0) return;
  if constexpr (kNorms) {
    team_.meet();
    const Timed timed_cells(Phase::kCell);
    const Range own = part(now, team_.me, team_.members);
    for (int64_t r = own.begin; r < own.end; ++r) row_backward(s, r);
  } else if (is_projected(s)) {
    team_.meet();
    product<1>(
        weights(s_.w_hr[d], p_.weights[d].w_hr, 0, s.H), Inner{s.R}, units_, {0, now},
        [&](int64_t r) { return s.dh_operand + r * s.operand_ldh; },
        [&](int64_t r, int64_t u, int64_t n) FUSEDRNN_INLINE_LAMBDA { expect_saved(s, s.rows[r], u, n); },
        [&](int64_t r, int64_t v, const V* acc, int) { cell_backward(s, r, v * L, acc[0], V(0)); });
  }
  if constexpr (kTwoStage) {
    team_.meet();
    product<1>(
        weights(s_.w_rest[d], p_.weights[d].w_hh, F * s.H, s.R), Inner{kRest * s.gate}, outputs_, {0, now},
        [&](int64_t r) { return s.dg_operand + r * s.operand_ldg + F * s.gate; }, nothing_expected,
        [&](int64_t r, int64_t v, const V* acc, int) { first_stage_backward(s, r, v * L, acc[0]); });
  }
  team_.meet();
}

// What cell_backward will read of a row's units [u, u + n).
template <class Cell, class T>
FUSEDRNN_INLINE void BackwardPass<Cell, T>::expect_saved(const Step& s, const Row& at, int64_t u, int64_t n) {
  for (int k = 0; k < K + Z - 1; ++k) prefetch_to_read(at.saved + k * s.H + u, n);
  for (int k = 0; k < kBeside; ++k) prefetch_to_read(at.c_prev + k * at.ldc + u, n);
  if (is_projected(s)) return;
  if (at.h_prev) prefetch_to_read(at.h_prev + u, n);
  if constexpr (K == 0) prefetch_to_read(at.y + u, n);
}

// The further states that the cell gave: c_t, but where that keeps something of c_{t-1}.
template <class Cell, class T>
FUSEDRNN_INLINE void BackwardPass<Cell, T>::candidates(const Row& at, const Values<V, K>& saved, Values<V, Z>& cur,
                                                       int64_t H, int64_t u) {
  if constexpr (Z == 2) {
    if (at.noise.c) {
      Values<V, Z> prev;
      prev[1] = load<S>(at.c_prev + u, H - u);
      cur[1] = Cell::candidate(saved, prev);
      return;
    }
  }
  for (int k = 1; k < Z; ++k) cur[k] = load<S>(at.saved + (K + k - 1) * H + u, H - u);
}

// The cell at sample r, units from u on. dh: dL/d of the h that the cell gave, or of the unprojected output; direct:
// what goes past the cell to h_{t-1}.
template <class Cell, class T>
FUSEDRNN_INLINE void BackwardPass<Cell, T>::cell_backward(const Step& s, int64_t r, int64_t u, V dh, V direct) {
  const Row& at = s.rows[r];
  const int64_t H = s.H, n = H - u;
  Values<V, K> saved;
  Values<V, Z> prev, cur, d;
  Values<V, G> dx, drec;
  Values<V, Z> direct_c;  // from 1 on
  for (int g = 0; g < G; ++g) dx[g] = drec[g] = V(0);
  for (int k = 0; k < K; ++k) saved[k] = load<S>(at.saved + k * H + u, n);
  prev[0] = is_projected(s) ? V(0) : previous_h(at, u, s.R);
  if constexpr (!kProduct) prev[0] = with_mask(s.mask_of(r), u, s.R, prev[0]);
  if (K == 0 && at.noise.h) cur[0] = load<S>(at.saved + u, n);
  else cur[0] = is_projected(s) ? V(0) : load<S>(at.y + u, n);
  d[0] = dh;
  UnitParameters<Cell, V> parameters = s.parameters_of(u);
  if constexpr (Z > 1) {
    candidates(at, saved, cur, H, u);
    for (int k = 1; k < Z; ++k) {
      const int64_t row = (r * kBeside + k - 1) * s.ldm + u;
      prev[k] = load<S>(at.c_prev + (k - 1) * at.ldc + u, n);
      d[k] = load(s.carry_c + row);
      if (s.norms) store(s.sent_dc + row, d[k]);
      if (at.dc) d[k] = d[k] + load<S>(at.dc + (k - 1) * H + u, n);
      direct_c[k] = V(0);
    }
    if (s.norms) {
      Values<V, Z> all;
      for (int k = 1; k < Z; ++k) all[k] = d[k];
      if (!at.noise.c) parameters.dc_of(saved, cur, d, all);
      for (int k = 1; k < Z; ++k) store(s.all_dc + (r * kBeside + k - 1) * s.ldm + u, all[k]);
    }
    if (at.noise.c) direct_c[1] = zoneout_backward(at.noise.c(u, n), d[1]);  // of a cell with two states
  }
  parameters.backward(saved, prev, cur, d, dx, drec);
  if constexpr (!kProduct) d[0] = with_mask(s.mask_of(r), u, s.R, d[0]);
  for (int g = 0; g < G; ++g) s.put(r, g, u, drec[g]);
  for (int g = G - kSplit; g < G; ++g) s.put(r, g + kSplit, u, dx[g]);
  for (int k = 0; k < kParameters; ++k) s.put(r, kFactors + k, u, parameters.gradient[k]);
  if (!is_projected(s)) store(s.carry_h + r * s.ldh + u, d[0] + direct);
  for (int k = 1; k < Z; ++k) store(s.carry_c + (r * kBeside + k - 1) * s.ldm + u, s.limited(d[k] + direct_c[k]));
}

template <class Cell, class T>
FUSEDRNN_INLINE void BackwardPass<Cell, T>::first_stage_backward(const Step& s, int64_t r, int64_t u, V dq) {
  const Row& at = s.rows[r];
  const int64_t H = s.H, n = H - u;
  const S* dg = s.dg + r * s.ldg + u;
  Values<V, K> saved;
  Values<V, Z> prev, d;
  Values<V, G> dx, drec;
  for (int k = 0; k < K; ++k) saved[k] = load<S>(at.saved + k * H + u, n);
  for (int g = 0; g < G; ++g) dx[g] = drec[g] = load<S>(dg + g * H, n);
  const T* mask = s.mask_of(r);
  prev[0] = with_mask(mask, u, s.R, previous_h(at, u, s.R));
  d[0] = V(0);
  UnitParameters<Cell, V> parameters = s.parameters_of(u);
  for (int k = 0; k < kParameters; ++k) parameters.gradient[k] = load<S>(dg + (kFactors + k) * H, n);
  parameters.backward_first(saved, prev, dq, d, dx, drec);
  for (int g = 0; g < F; ++g) s.put(r, g, u, drec[g]);
  for (int k = 0; k < kParameters; ++k) s.put(r, kFactors + k, u, parameters.gradient[k]);
  store(s.carry_h + r * s.ldh + u, load(s.carry_h + r * s.ldh + u) + with_mask(mask, u, s.R, d[0]));
}

template <class Cell, class T>
void BackwardPass<Cell, T>::put_second_operand(const Row& at, const T* mask, int64_t r) const {
  if constexpr (kTwoStage || Cell::kProjectable) {
    for (int64_t u = 0; u < z_.H; u += L) {
      Values<V, K> saved;
      Values<V, Z> state;
      for (int k = 0; k < K; ++k) saved[k] = load<S>(at.saved + k * z_.H + u, z_.H - u);
      if constexpr (kTwoStage) {
        state[0] = with_mask(mask, u, z_.R, previous_h(at, u, z_.R));
        b_.m.put(r, u, Cell::recurrent_operand(saved, state));
      } else {
        state[0] = V(0);
        candidates(at, saved, state, z_.H, u);
        b_.m.put(r, u, Cell::output(saved, state));
      }
    }
  }
}
