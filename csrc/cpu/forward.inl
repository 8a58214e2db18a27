// The forward time loop: one parallel region for the whole layer. Of a cell it knows the constants alone, so it is
// compiled once for all of them; the cell's part is forward_step.inl. Included after team.h.
//
// A team takes an item (direction, slice of the batch) and goes through time in chunks. For a chunk it first makes
// x W_ih^T + b_ih of all its rows (each member its own units), then steps: the product with h_{t-1} in register
// tiles, the cell on each block of rows while it is in the first-level cache, a barrier after each product. With
// `saved`, the projection is written straight into the rows that the activated gates will overwrite.
//
// Layouts: gates [g][pitch]; saved rows [k][H] for k in [0, kSaved), then the states besides h; h double-buffered
// [2][samples][R], and so is what the products read of it, if that is masked or rounded.
//
// With weights of int8 the products read int8 (quantize.h). An h of at most 1 (Bound of cell.h) has the scale 1/127 and
// is rounded where it is made; another one has a scale of its row, and is rounded by row after the step. Which it is
// follows from h_{t-1} alone: a sequence gives the same numbers in pieces.

template <class Types>
class ForwardLoop {
 protected:
  using T = typename LayerTypes<Types>::Element;
  using W = typename LayerTypes<Types>::Weight;
  using S = typename LayerTypes<Types>::Compute;
  using E = typename LayerTypes<Types>::Operand;
  using P = typename LayerTypes<Types>::Panel;
  using V = Vec<S>;
  using Sum = Sums<E>;
  static constexpr int L = V::kLanes;
  static constexpr bool kRounded = sizeof(E) != sizeof(S);  // h, before a product reads it
  static constexpr bool kQuantized = std::is_same_v<E, int8_t>;
  static constexpr int64_t kChunkRows = 192;  // of projected gates: they stay in the second-level cache
  static constexpr int64_t padded(int64_t n) { return ceil_div(n, L) * L; }  // to whole vectors

  struct Shared : SharedPass {
    const CellConstants* cell;
    bool kept, ready;  // panels that outlive the call, packed before
    bool packed;
    bool copies_x;  // of another type, or rows that end inside a word
    // panels of each direction
    P *w_ih[2], *w_hh[2], *w_rest[2], *w_hr[2];
    S *b_ih[2], *b_hh[2], *w_unit[2];
    S *s_ih[2], *s_hh[2], *s_hr[2];  // scales of int8 weights
  };
  struct TeamBuffers {
    S *h[2], *c;      // [samples][row_stride], of c [samples][states besides h][row_stride]
    E* operand[2];    // h as the products read it, masked and rounded; where that changes nothing, h itself
    E* m;             // [samples][row_stride], what the second product of a step reads
    S* gates;         // [chunk rows][row_stride of G*H], unless they live in `saved`
    E* x;             // [chunk rows][I], if x must be copied
    const E** x_row;  // [members][chunk rows]
    S** gate_row;     // [members][chunk rows]
    S** saved_row;    // [members][chunk rows], null without saved
    S* rec;           // [samples][row_stride of G*H], with norms: W_hh h, unless it lives in `saved`
    S* late;          // [members][late][row_stride of H], with a norm of c: what a row's second half takes
    Int8Rows int8;    // with int8 weights
  };

 public:
  // Bytes of the packed weights of a layer.
  static int64_t panel_bytes(const LayerSizes& size, const CellConstants& cell) {
    Shared unused{};
    unused.cell = &cell;
    Carver measure(nullptr);
    carve_panels(size, unused, measure);
    return measure.used();
  }

  // work: what a thread does, by a loop of this cell.
  static bool run(const ForwardProblem& p, const CellConstants& cell,
                  void (*work)(const ForwardProblem&, const Shared&, int thread)) {
    Shared shared{};
    shared.cell = &cell;
    shared.plan = make_plan(p.size, cell.gates, L, p.threads);
    const bool done = in_parallel(
        shared.plan.teams * shared.plan.members, [&](int threads) { return prepare(p, shared, threads); },
        [&](int thread) { work(p, shared, thread); });
    if (done) release_scratch();
    return done;
  }

  void work() {
    pack();
    meet_all();
    [[maybe_unused]] const TileUse tiles{};
    run_items();
  }

 protected:
  // What a cell brings: its matrices packed; x W_ih^T + b_ih of the chunk's rows; and one time step of its rows
  // [row, row + n): h[now] in, the other h out.
  virtual void pack_matrices(int d) const = 0;
  virtual void project(int d, int64_t rows) const = 0;
  virtual void step(const Item& item, int64_t t, int64_t row, int now) = 0;

  // Plan, memory and flags for the threads that OpenMP has started; false: no memory.
  static bool prepare(const ForwardProblem& p, Shared& s, int threads) {
    s.share(p.size, s.cell->gates, L, threads);
    s.ready = p.panels && p.panels->members == s.plan.members;
    s.kept = s.ready || (p.panels && p.panels->members == 0);
    s.packed = s.kept || p.size.N > kRowsUnpacked;
    s.most_rows = min64(p.size.N, kChunkRows + s.most_samples);
    s.copies_x = !std::is_same_v<E, T> || whole_steps<E>(p.size.I) != p.size.I || kRowsAhead;
    const bool enough = s.allocate([&](Carver& carver) { carve_shared(p, s, carver); },
                                   [&](Carver& carver) { carve_team(p, s, carver); });
    if (!enough) return false;
    if (p.panels) p.panels->used = s.kept;
    if (s.kept) {
      Carver panels(static_cast<char*>(p.panels->data));
      carve_panels(p.size, s, panels);
      p.panels->members = s.plan.members;
    }
    return true;
  }

  static void carve_shared(const ForwardProblem& p, Shared& s, Carver& carver) {
    const LayerSizes& z = p.size;
    const int64_t gates = s.cell->gates * z.H;
    s.flags = carver.take<Flag>(s.plan.teams * s.plan.members);
    for (int d = 0; d < z.D; ++d) {
      s.b_ih[d] = carver.take<S>(gates);
      s.b_hh[d] = carver.take<S>(gates);
      s.w_unit[d] = carver.take<S>(s.cell->parameters * z.H);
      if constexpr (kQuantized) {
        s.s_ih[d] = carver.take<S>(gates);
        s.s_hh[d] = carver.take<S>(gates);
        s.s_hr[d] = carver.take<S>(z.projected ? z.R : 0);
      }
    }
    if (s.packed && !s.kept) carve_panels(z, s, carver);
  }

  static void carve_panels(const LayerSizes& z, Shared& s, Carver& carver) {
    const int64_t units = padded(z.H), outputs = padded(z.R);
    for (int d = 0; d < z.D; ++d) {
      s.w_ih[d] = carver.take<P>(whole_steps<E>(z.I) * s.cell->gates * units);
      s.w_hh[d] = carver.take<P>(whole_steps<E>(z.R) * s.cell->first * units);
      s.w_rest[d] = carver.take<P>(whole_steps<E>(z.R) * s.cell->second_gates() * units);
      s.w_hr[d] = carver.take<P>(z.projected ? whole_steps<E>(z.H) * outputs : 0);
    }
  }

  static TeamBuffers carve_team(const ForwardProblem& p, const Shared& s, Carver& carver) {
    const LayerSizes& z = p.size;
    const CellConstants& cell = *s.cell;
    const int64_t rows = s.most_rows, members = s.plan.members, samples = s.most_samples;
    TeamBuffers b;
    b.h[0] = carver.take<S>(samples * row_stride<S>(z.R));
    b.h[1] = carver.take<S>(samples * row_stride<S>(z.R));
    for (int i = 0; i < 2; ++i) {
      if constexpr (!kRounded) b.operand[i] = b.h[i];
      if (kRounded || p.noise.mask_h) b.operand[i] = carver.take<E>((samples + kRowsAhead) * row_stride<E>(z.R));
    }
    b.c = carver.take<S>(cell.beside() * samples * row_stride<S>(z.H));
    b.m = carver.take<E>(cell.second_gates() || z.projected ? (samples + kRowsAhead) * row_stride<E>(z.H) : 0);
    b.gates = carver.take<S>(p.saved && cell.saved ? 0 : rows * row_stride<S>(cell.gates * padded(z.H)));
    b.x = carver.take<E>(s.copies_x ? (rows + kRowsAhead) * row_stride<E>(z.I) : 0);
    b.x_row = carver.take<const E*>(rows * members);
    b.gate_row = carver.take<S*>(rows * members);
    b.saved_row = carver.take<S*>(p.saved ? rows * members : 0);
    b.rec = carver.take<S>(cell.norms && !p.saved ? samples * row_stride<S>(cell.gates * z.H) : 0);
    b.late = carver.take<S>(cell.norms ? members * cell.late * row_stride<S>(z.H) : 0);
    if constexpr (kQuantized) b.int8.carve(carver, rows, samples);
    return b;
  }

  ForwardLoop(const ForwardProblem& p, const Shared& shared, int thread, Bound bound)
      : p_(p), z_(p.size), s_(shared), cell_(*shared.cell), thread_(thread), index_(thread / shared.plan.members),
        team_(shared.flags + index_ * shared.plan.members, thread % shared.plan.members, shared.plan.members),
        ldh_(row_stride<S>(z_.R)), ldc_(row_stride<S>(z_.H)), ldo_(row_stride<E>(z_.R)), ldm_(row_stride<E>(z_.H)),
        pitch_((p.saved && cell_.saved) || cell_.norms ? z_.H : padded(z_.H)), bound_(bound),
        unbound_(bound == Bound::kNone || z_.projected) {
    if (index_ >= s_.plan.teams) return;
    Carver carver(s_.block + s_.shared_bytes + index_ * s_.team_bytes);
    b_ = carve_team(p_, s_, carver);
    b_.x_row += team_.me * s_.most_rows;
    b_.gate_row += team_.me * s_.most_rows;
    if (p_.saved) b_.saved_row += team_.me * s_.most_rows;
    b_.late += team_.me * cell_.late * ldc_;
    units_ = part(ceil_div(z_.H, L), team_.me, team_.members);
    outputs_ = part(ceil_div(z_.R, L), team_.me, team_.members);
  }

  void pack() const {
    const Timed timed(Phase::kPack);
    for (int d = 0; d < z_.D; ++d) {
      const LayerWeights& w = p_.weights[d];
      if (s_.packed && !s_.ready) pack_matrices(d);
      if (thread_ == d % s_.threads) {
        for (int64_t i = 0; i < cell_.gates * z_.H; ++i) {
          s_.b_ih[d][i] = w.b_ih ? to_compute(static_cast<const T*>(w.b_ih)[i]) : S(0);
          s_.b_hh[d][i] = w.b_hh ? to_compute(static_cast<const T*>(w.b_hh)[i]) : S(0);
        }
        for (int64_t i = 0; i < cell_.parameters * z_.H; ++i)
          s_.w_unit[d][i] = to_compute(static_cast<const T*>(w.w_unit)[i]);
        if constexpr (kQuantized) {
          const WeightScales& scales = p_.scales[d];
          __builtin_memcpy(s_.s_ih[d], scales.ih, cell_.gates * z_.H * sizeof(S));
          __builtin_memcpy(s_.s_hh[d], scales.hh, cell_.gates * z_.H * sizeof(S));
          if (z_.projected) __builtin_memcpy(s_.s_hr[d], scales.hr, z_.R * sizeof(S));
        }
      }
    }
  }

  template <int kGroup>
  void pack_weights(int d, const void* w, int64_t units, int64_t inner, P* panels) const {
    const Range vectors = Packing{s_.plan, thread_, s_.threads}.own(d, ceil_div(units, L), kGroupVectors<kGroup>);
    pack_rows<kGroup, E>(static_cast<const W*>(w), units, inner, vectors, panels);
  }

  FUSEDRNN_INLINE Weights<E, W, P> weights(const P* panels, const void* w, int64_t units) const {
    return {panels, s_.packed ? nullptr : static_cast<const W*>(w), units};
  }

  // What a product gives: of a sum, the scales of its units, that of its row.
  FUSEDRNN_INLINE static V number(Sum sum, [[maybe_unused]] const S* scales, [[maybe_unused]] S row) {
    if constexpr (kQuantized) return dequantized(sum, scales, row);
    else return sum;
  }

  void run_items() {
    if (index_ >= s_.plan.teams) return;
    for (int i = index_; i < z_.D * s_.plan.slices; i += s_.plan.teams) run_item({z_, s_.bounds, s_.plan.slices, i});
  }

  // Step s of an item is time t: the reverse direction starts at the last step that has active samples, each
  // sample with its initial state.
  FUSEDRNN_INLINE static int64_t time_of(const Item& item, int64_t s) { return item.d ? item.steps - 1 - s : s; }

  void run_item(const Item& item) {
    initial_states(item);
    team_.meet();
    if constexpr (kQuantized) by_row_ = rounds_by_row(item);
    for (int64_t s0 = 0, s1 = 0; s0 < item.steps; s0 = s1) {
      int64_t rows = 0;
      for (; s1 < item.steps && rows < kChunkRows; ++s1) rows = list_rows(item, time_of(item, s1), rows);
      if (s_.copies_x) {
        const Range own = part(rows, team_.me, team_.members);
        copy_x(item, s0, s1, own);
        team_.meet();
      }
      project(item.d, rows);
      if (cell_.norms) {
        team_.meet();
        normalise_inputs(part(rows, team_.me, team_.members));  // read after the meeting of a step's product
      }
      for (int64_t s = s0, row = 0; s < s1; ++s) {
        const int64_t t = time_of(item, s);
        step(item, t, row, s & 1);
        row += item.rows(t);
      }
    }
    final_states(item);
    team_.meet();  // before the next item's initial states
  }

  void initial_states(const Item& item) {
    if (kRounded && team_.me == 0) clear_ends(item.samples());
    for (int64_t b = 0; b < item.samples(); ++b) {
      const int64_t sample = item.d * z_.B + item.first + b;
      for (int64_t v = outputs_.begin; v < outputs_.end; ++v) {
        const V h = p_.h0 ? load<S>(static_cast<const T*>(p_.h0) + sample * z_.R + v * L, z_.R - v * L) : V(0);
        store(b_.h[0] + b * ldh_ + v * L, h);
        store(b_.h[1] + b * ldh_ + v * L, h);  // a sample that starts late finds it in either buffer
        if (kQuantized || (!kRounded && !p_.noise.mask_h)) continue;
        const T* mask = p_.noise.mask_h ? static_cast<const T*>(p_.noise.mask_h) + sample * z_.R : nullptr;
        const V operand = with_mask(mask, v * L, h);
        store(b_.operand[0] + b * ldo_ + v * L, operand);
        store(b_.operand[1] + b * ldo_ + v * L, operand);
      }
      for (int64_t v = units_.begin; v < units_.end; ++v) {
        for (int k = 0; k < cell_.beside(); ++k) {
          const T* const c0 = p_.c0 ? static_cast<const T*>(p_.c0) + (sample * cell_.beside() + k) * z_.H : nullptr;
          store(b_.c + (b * cell_.beside() + k) * ldc_ + v * L, c0 ? load<S>(c0 + v * L, z_.H - v * L) : V(0));
        }
        if (kRounded && reads_m()) store(b_.m + b * ldm_ + v * L, V(0));
      }
    }
    if constexpr (kQuantized) {
      team_.meet();
      const Range own = part(item.samples(), team_.me, team_.members);
      for (int64_t b = own.begin; b < own.end; ++b) {
        quantize_h(0, b);
        quantize_h(1, b);
        b_.int8.h_bad[0][b] = b_.int8.h_bad[1][b] = b_.int8.m_bad[b] = 0;
      }
    }
  }

  // Whether rows of h are rounded after each step: h may be above 1.
  bool rounds_by_row(const Item& item) const {
    if (unbound_ || (bound_ == Bound::kOne && !p_.noise.changes_h())) return unbound_;
    for (int64_t b = 0; b < item.samples(); ++b) {
      if (!(b_.int8.h_scale[0][b] <= kScaleOfOne)) return true;  // or NaN
    }
    return false;
  }

  // A row of h as the products read it.
  void quantize_h(int buffer, int64_t b) {
    const S* h = b_.h[buffer] + b * ldh_;
    S scale = scale_of_row(h, z_.R);
    if (!unbound_ && scale < kScaleOfOne) scale = kScaleOfOne;
    quantize_row(h, z_.R, factor_of(scale), b_.operand[buffer] + b * ldo_);
    b_.int8.h_scale[buffer][b] = scale;
  }

  // What products read past the last vector of a row must be a number; nothing is written there later.
  void clear_ends(int64_t samples) const {
    const auto clear = [&](E* rows, int64_t stride, int64_t n) {
      for (int64_t b = 0; b < samples; ++b) {
        for (int64_t u = padded(n); u < whole_steps<E>(n); u += L) store(rows + b * stride + u, V(0));
      }
    };
    for (E* operand : b_.operand) clear(operand, ldo_, z_.R);
    if (reads_m()) clear(b_.m, ldm_, z_.H);
  }

  // Appends the rows of step t to the chunk's lists; returns the number of rows so far.
  int64_t list_rows(const Item& item, int64_t t, int64_t rows) {
    const int64_t n = item.rows(t), gate_stride = row_stride<S>(cell_.gates * pitch_);
    for (int64_t b = 0; b < n; ++b, ++rows) {
      if (s_.copies_x) b_.x_row[rows] = b_.x + rows * row_stride<E>(z_.I);
      else b_.x_row[rows] = row_at<E>(p_.x, z_.offset, t, item.first + b);
      b_.gate_row[rows] = b_.gates + rows * gate_stride;
      if (p_.saved) {
        S* saved = static_cast<S*>(p_.saved) + (item.d * z_.N + z_.offset[t] + item.first + b) * p_.saved_stride;
        b_.saved_row[rows] = saved;
        if (cell_.saved) b_.gate_row[rows] = saved + (cell_.norms ? cell_.own_saved * z_.H : 0);
      }
    }
    return rows;
  }

  void copy_x(const Item& item, int64_t s0, int64_t s1, Range own) {
    int64_t row = 0;
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t t = time_of(item, s), n = item.rows(t);
      for (int64_t b = max64(0, own.begin - row); b < min64(n, own.end - row); ++b) {
        const T* from = row_at<T>(p_.x, z_.offset, t, item.first + b);
        E* to = b_.x + (row + b) * row_stride<E>(z_.I);
        if constexpr (kQuantized) {
          const S scale = b_.int8.x_scale[row + b] = scale_of_row(from, z_.I);
          quantize_row(from, z_.I, factor_of(scale), to);
          continue;
        }
        for (int64_t i = 0; i < whole_steps<E>(z_.I); i += L) store(to + i, load<S>(from + i, z_.I - i));
      }
      row += n;
    }
  }

  FUSEDRNN_INLINE V with_mask(const T* mask, int64_t u, V h) const {
    return mask ? masked(h, load<S>(mask + u, z_.R - u)) : h;
  }

  // Every cell of so many gates.
  template <int G>
  void project_gates(int d, int64_t rows) const {
    const Timed timed(Phase::kInputProduct);
    const int64_t H = z_.H, pitch = pitch_;
    const bool with_bias = !cell_.norms;
    const S *bias = s_.b_ih[d], *scales = s_.s_ih[d];
    const float* x_scale = b_.int8.x_scale;
    const E* const* x_row = b_.x_row;
    S* const* gate_row = b_.gate_row;
    product<G>(
        weights(s_.w_ih[d], p_.weights[d].w_ih, H), Inner{z_.I}, units_, {0, rows}, [&](int64_t r) { return x_row[r]; },
        [&](int64_t r, int64_t u, int64_t n) FUSEDRNN_INLINE_LAMBDA {
          for (int g = 0; g < G; ++g) prefetch_to_write(gate_row[r] + g * pitch + u, n);
        },
        [&](int64_t r, int64_t v, const Sum* acc, int stride) {
          const int64_t u = v * L;
          S* gates = gate_row[r] + u;
          const S row_scale = kQuantized ? x_scale[r] : 1;
          for (int g = 0; g < G; ++g) {
            const V product = number(acc[g * stride], scales + g * H + u, row_scale);
            store(gates + g * pitch, with_bias ? product + load(bias + g * H + u) : product, pitch - u);
          }
        });
  }

  // W_ih x of these rows of the chunk.
  void normalise_inputs(Range own) const {
    const Timed timed(Phase::kCell);
    const int64_t states_end = (cell_.saved + cell_.beside()) * z_.H;
    for (int64_t r = own.begin; r < own.end; ++r) {
      const Moments<S> of_x = normalise_row(b_.gate_row[r], cell_.gates * z_.H);
      if (!p_.saved) continue;
      b_.saved_row[r][states_end + RowNumbers::kScaleOfX] = of_x.scale;
      for (int64_t i = states_end + cell_.row_values; i < p_.saved_stride; ++i) b_.saved_row[r][i] = 0;
    }
  }

  void final_states(const Item& item) {
    const Range own = part(item.samples(), team_.me, team_.members);
    for (int64_t t = 0; t < item.steps; ++t) {  // the samples whose last step is step t
      const int64_t next = t + 1 < item.steps ? item.rows(t + 1) : 0;
      for (int64_t b = max64(next, own.begin); b < min64(item.rows(t), own.end); ++b) {
        const int64_t sample = item.d * z_.B + item.first + b, steps = item.d ? item.steps : t + 1;
        copy_row(b_.h[steps & 1] + b * ldh_, static_cast<T*>(p_.h_n) + sample * z_.R, z_.R);
        for (int k = 0; k < cell_.beside(); ++k) {
          T* const c_n = static_cast<T*>(p_.c_n) + (sample * cell_.beside() + k) * z_.H;
          copy_row(b_.c + (b * cell_.beside() + k) * ldc_, c_n, z_.H);
        }
      }
    }
  }

  FUSEDRNN_INLINE static void copy_row(const S* from, T* to, int64_t n) {
    for (int64_t i = 0; i < n; i += L) store(to + i, load(from + i), n - i);
  }

  // Whether a step has a second product, of m.
  bool reads_m() const { return cell_.second_gates() || z_.projected; }

  const ForwardProblem& p_;
  const LayerSizes& z_;
  const Shared& s_;
  const CellConstants& cell_;
  const int thread_, index_;  // index of the team
  Team team_;
  TeamBuffers b_;
  Range units_, outputs_;  // own vectors of H and of R
  const int64_t ldh_, ldc_, ldo_, ldm_;
  const int64_t pitch_;  // between the gates of a row: whole vectors, unless they live in `saved` or have norms
  const Bound bound_;
  const bool unbound_;   // whether nothing bounds h
  bool by_row_ = false;  // whether rows of h are rounded to int8 after a step
};
