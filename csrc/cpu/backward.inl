// Back-propagation through time: one parallel region for the whole layer. Of a cell it knows the constants alone, so it
// is compiled once for all of them; the cell's part is backward_step.inl. Included after forward.inl.
//
// A team goes back through an item in chunks of steps. Per step: dL/dh = dy + the product of the later step's gate
// gradients with W_hh, in register tiles, then the cell's backward on each block of rows; a barrier a product. dG of a
// chunk stays in cache and is used up before the next chunk: dx = dG W_ih, and the weight gradients, one product over
// all rows of the chunk (weight_gradients.inl). dG of all T is never stored. Slices of the batch accumulate apart and
// are added in a fixed order, so the same number of threads gives the same bits.
//
// Columns of dG: drec of all gates, then dx of the last `split` gates, then what the unit's parameters get, and with
// norms the gradients of the gates' arguments (cells/layer_norm.h); [k][H]. As the products read it, drec and dx alone:
// [k][H rounded up to whole words].

template <class T>
class BackwardLoop {
 protected:
  using S = typename ComputeType<T>::Type;
  using E = typename OperandType<T>::Type;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;
  static constexpr bool kConvert = sizeof(T) != sizeof(S);
  static constexpr bool kRounded = sizeof(E) != sizeof(S);  // dG, before a product reads it
  static constexpr int64_t kChunkBytes = 1 << 20;           // of dG: it stays in cache between its three uses
  static constexpr int64_t kLeastRows = 64, kMostRows = 512;

  struct Shared : SharedPass {
    const CellConstants* cell;
    int64_t chunk_rows;
    bool direct;  // weight gradients accumulate in the result itself
    bool packed;  // weights; else they are read as they lie, for so few rows
    E *w_ih[2], *w_hh[2], *w_rest[2], *w_hr[2];
    S* w_unit[2];
    S *dw_ih, *dw_hh, *dw_hr, *db;  // [items][...], db: [items][columns*H]
  };
  struct Row {  // where a row of the chunk finds what forward kept
    const S* saved;
    const T *y, *h_prev, *dy, *dc;  // h_prev, dy, dc: null for zeros
    const S* c_prev;                // each state of it ldc after the one before
    int64_t ldc;
    RowNoise<T> noise;
  };
  struct WeightSums {  // of one item
    S *w_ih, *w_hh, *w_hr, *b;
  };
  struct TeamBuffers {
    S *dg, *dh;                     // [chunk rows][columns*H], [R] (projection or norms)
    E *dg_operand, *dh_operand;     // as the products read them: rounded, or the same
    S *sent_dh, *sent_dc, *all_dc;  // [chunk rows][R], [beside][H], [beside][H]: what norms are of
    S* scale;                       // [members][states][samples]: of what is sent back, clipped by its norm
    Strips<E> x, h, m;              // [chunk rows][I], [R], [H]: right operands of the weight gradients
    S *carry_h, *carry_c, *c0;      // [samples][R], [beside][H], [beside][H]
    Row* rows;                      // [members][chunk rows]
  };

 public:
  // work: what a thread does, by a loop of this cell.
  static bool run(const BackwardProblem& p, const CellConstants& cell,
                  void (*work)(const BackwardProblem&, const Shared&, int thread)) {
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
    meet_all();
    if (p_.weight_gradients) add_slices();
    if (p_.dx) add_directions();
  }

 protected:
  // What a cell brings. A step: samples [0, later) have gate gradients of the step worked on before at chunk row
  // `later_row` on, samples [0, now) are active at this step, chunk rows from `row` on. A sample in one set only starts
  // or ends here. The first `severed` samples of the later step send nothing.
  virtual void step(const Item& item, int64_t later_row, int64_t later, int64_t row, int64_t now, int64_t severed) = 0;
  // The row that the second product of a step read, again, as row r of the weight gradients' operand.
  virtual void put_second_operand(const Row& at, const T* mask, int64_t r) const = 0;

  // Plan, memory and flags for the threads that OpenMP has started; false: no memory.
  static bool prepare(const BackwardProblem& p, Shared& s, int threads) {
    s.share(p.size, s.cell->gates, L, threads);
    s.chunk_rows = kChunkBytes / (row_stride<S>(s.cell->columns * p.size.H) * static_cast<int64_t>(sizeof(S)) +
                                  (kRounded ? operand_stride(p.size, *s.cell) * static_cast<int64_t>(sizeof(E)) : 0));
    s.chunk_rows = min64(kMostRows, max64(kLeastRows, s.chunk_rows));
    s.most_rows = min64(p.size.N, s.chunk_rows + s.most_samples);
    s.direct = !kConvert && s.plan.slices == 1;
    s.packed = !std::is_same_v<T, E> || kPair<E> > 1 || p.size.N > kRowsUnpackedBackward;
    return s.allocate([&](Carver& carver) { carve_shared(p, s, carver); },
                      [&](Carver& carver) { carve_team(p, s, carver); });
  }

  // Of dG as the products read it: dG itself, unless that is rounded.
  static int64_t operand_stride(const LayerSizes& z, const CellConstants& cell) {
    return kRounded ? row_stride<E>(cell.factors() * whole_steps<E>(z.H)) : row_stride<E>(cell.columns * z.H);
  }

  static void carve_shared(const BackwardProblem& p, Shared& s, Carver& carver) {
    const LayerSizes& z = p.size;
    const CellConstants& cell = *s.cell;
    const int64_t gate = whole_steps<E>(z.H);
    const int64_t inputs = ceil_div(z.I, L) * L, units = ceil_div(z.H, L) * L, outputs = ceil_div(z.R, L) * L;
    const auto panels = [&](int64_t size) { return carver.take<E>(s.packed ? size : 0); };
    s.flags = carver.take<Flag>(s.plan.teams * s.plan.members);
    for (int d = 0; d < z.D; ++d) {
      s.w_ih[d] = panels(p.dx ? cell.gates * gate * inputs : 0);
      s.w_hh[d] = panels(cell.first * gate * outputs);
      s.w_rest[d] = panels(cell.second_gates() * gate * outputs);
      s.w_unit[d] = carver.take<S>(cell.parameters * z.H);
      s.w_hr[d] = panels(z.projected ? whole_steps<E>(z.R) * units : 0);
    }
    const int64_t items = p.weight_gradients ? z.D * s.plan.slices : 0, own = s.direct ? 0 : items;
    s.dw_ih = carver.take<S>(own * cell.gates * z.H * z.I);
    s.dw_hh = carver.take<S>(cell.first ? own * cell.gates * z.H * z.R : 0);
    s.dw_hr = carver.take<S>(z.projected ? own * z.R * z.H : 0);
    s.db = carver.take<S>(items * cell.columns * z.H);
  }

  static TeamBuffers carve_team(const BackwardProblem& p, const Shared& s, Carver& carver) {
    const LayerSizes& z = p.size;
    const CellConstants& cell = *s.cell;
    const int64_t rows = s.most_rows, samples = s.most_samples;
    const int64_t kept = p.weight_gradients ? whole_steps<E>(rows) : 0;
    TeamBuffers b;
    b.dg = carver.take<S>(rows * row_stride<S>(cell.columns * z.H));
    b.dh = carver.take<S>(z.projected || cell.norms ? rows * row_stride<S>(z.R) : 0);
    if constexpr (kRounded) {
      b.dg_operand = carver.take<E>((rows + kRowsAhead) * operand_stride(z, cell));
      b.dh_operand = carver.take<E>(z.projected ? (rows + kRowsAhead) * row_stride<E>(z.R) : 0);
    } else {
      b.dg_operand = b.dg;
      b.dh_operand = b.dh;
    }
    b.sent_dh = carver.take<S>(p.norms ? rows * row_stride<S>(z.R) : 0);
    b.sent_dc = carver.take<S>(p.norms ? cell.beside() * rows * row_stride<S>(z.H) : 0);
    b.all_dc = carver.take<S>(p.norms ? cell.beside() * rows * row_stride<S>(z.H) : 0);
    b.scale = carver.take<S>(p.clip_by_norm ? cell.states * samples * s.plan.members : 0);
    const auto strips = [&](int64_t n, int64_t most) {
      return Strips<E>{carver.take<E>(Strips<E>::elements(n, most)), n, most};
    };
    b.x = strips(z.I, kept);
    b.h = strips(z.R, cell.first ? kept : 0);
    b.m = strips(z.H, cell.second_gates() || z.projected ? kept : 0);
    b.carry_h = carver.take<S>(samples * row_stride<S>(z.R));
    b.carry_c = carver.take<S>(cell.beside() * samples * row_stride<S>(z.H));
    b.c0 = carver.take<S>(cell.beside() * samples * row_stride<S>(z.H));
    b.rows = carver.take<Row>(rows * s.plan.members);
    return b;
  }

  BackwardLoop(const BackwardProblem& p, const Shared& shared, int thread)
      : p_(p), z_(p.size), s_(shared), cell_(*shared.cell), thread_(thread), index_(thread / shared.plan.members),
        team_(shared.flags + index_ * shared.plan.members, thread % shared.plan.members, shared.plan.members),
        ldg_(row_stride<S>(cell_.columns * z_.H)), ldh_(row_stride<S>(z_.R)), ldm_(row_stride<S>(z_.H)),
        gate_(whole_steps<E>(z_.H)), operand_ldg_(operand_stride(z_, cell_)), operand_ldh_(row_stride<E>(z_.R)) {
    if (index_ >= s_.plan.teams) return;
    Carver carver(s_.block + s_.shared_bytes + index_ * s_.team_bytes);
    b_ = carve_team(p_, s_, carver);
    b_.rows += team_.me * s_.most_rows;
    b_.scale += team_.me * cell_.states * s_.most_samples;
    units_ = part(ceil_div(z_.H, L), team_.me, team_.members);
    outputs_ = part(ceil_div(z_.R, L), team_.me, team_.members);
  }

  void pack() const {
    for (int d = 0; d < z_.D && thread_ == 0; ++d) {
      const T* const own_parameters = static_cast<const T*>(p_.weights[d].w_unit);
      for (int64_t i = 0; i < cell_.parameters * z_.H; ++i) s_.w_unit[d][i] = to_compute(own_parameters[i]);
    }
    if (!s_.packed) return;
    const Timed timed(Phase::kPack);
    const Packing packing{s_.plan, thread_, s_.threads};
    const auto own = [&](int d, const void* w, int64_t blocks, int64_t rows, int64_t n, E* panels) {
      const Range vectors = packing.own(d, ceil_div(n, L), kGroupVectors<1>);
      pack_columns(static_cast<const T*>(w), blocks, rows, n, vectors, panels);
    };
    for (int d = 0; d < z_.D; ++d) {
      const LayerWeights& w = p_.weights[d];
      const int64_t first = cell_.first;
      if (first) own(d, w.w_hh, first, z_.H, z_.R, s_.w_hh[d]);
      if (cell_.second_gates()) {
        own(d, static_cast<const T*>(w.w_hh) + first * z_.H * z_.R, cell_.second_gates(), z_.H, z_.R, s_.w_rest[d]);
      }
      if (z_.projected) own(d, w.w_hr, 1, z_.R, z_.H, s_.w_hr[d]);
      if (!p_.dx) continue;  // W_ih: read by every member, for rows of its own
      const Range any = packing.any(ceil_div(z_.I, L), kGroupVectors<1>);
      pack_columns(static_cast<const T*>(w.w_ih), cell_.gates, z_.H, z_.I, any, s_.w_ih[d]);
    }
  }

  // A right operand, packed or as it lies: W from row `first` on, of n columns.
  Weights<E, T> weights(const E* panels, const void* w, int64_t first, int64_t n) const {
    if (s_.packed) return {panels, nullptr, 0};
    return {nullptr, nullptr, n, static_cast<const T*>(w) + first * n};
  }

  void run_items() {
    if (index_ >= s_.plan.teams) return;
    for (int i = index_; i < z_.D * s_.plan.slices; i += s_.plan.teams) run_item({z_, s_.bounds, s_.plan.slices, i}, i);
  }

  // Step s of the way back: the forward direction ends at its last step, the reverse direction at time 0.
  FUSEDRNN_INLINE static int64_t time_of(const Item& item, int64_t s) { return item.d ? s : item.steps - 1 - s; }

  void run_item(const Item& item, int index) {
    initial_carries(item);
    clear_ends();
    if (p_.weight_gradients) clear_weight_sums(item, index, false);
    bool begun = false;  // the sums of the weights' gradients
    team_.meet();
    for (int64_t s0 = 0, s1 = 0; s0 < item.steps; s0 = s1) {
      int64_t rows = 0;
      for (; s1 < item.steps && rows < s_.chunk_rows; ++s1) rows = list_rows(item, time_of(item, s1), rows);
      int64_t row = 0, later = 0;  // `later`: rows of the step worked on before, which end at `row`
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t now = item.rows(time_of(item, s));
        step(item, row - later, later, row, now, severed(item, s, later));
        row += now;
        later = now;
      }
      // dL/dh_{t-1} of the chunk's last step, into the carry.
      step(item, row - later, later, row, 0, severed(item, s1, later));
      if (p_.norms) give_norms(item, s0, s1, rows);
      if (p_.weight_gradients && rows > 0) {
        weight_gradients(item, index, s0, s1, rows, begun);
        begun = true;
      }
      if (p_.dgates) give_gate_gradients(item, s0, s1, rows);
      if (p_.dx) input_gradient(item, s0, s1, rows);
      team_.meet();  // before the next chunk's dG
    }
    if (p_.weight_gradients && !begun) clear_weight_sums(item, index, true);
    final_carries(item);
    team_.meet();
  }

  // Of the `later` samples of the step worked on before, those whose gradient must not reach step s.
  int64_t severed(const Item& item, int64_t s, int64_t later) const {
    if (p_.bptt_steps == 0 || s == 0 || s == item.steps) return 0;
    const int64_t t = time_of(item, s);
    return max64(t, time_of(item, s - 1)) % p_.bptt_steps ? 0 : min64(later, item.rows(t));
  }

  void initial_carries(const Item& item) {
    const auto read = [&](const void* from, int64_t at, int64_t u, int64_t n) {
      return from ? load<S>(static_cast<const T*>(from) + at + u, n - u) : V(0);
    };
    for (int64_t b = 0; b < item.samples(); ++b) {
      const int64_t sample = item.d * z_.B + item.first + b;
      for (int64_t v = outputs_.begin; v < outputs_.end; ++v) {
        store(b_.carry_h + b * ldh_ + v * L, read(p_.dh_n, sample * z_.R, v * L, z_.R));
      }
      for (int k = 0; k < cell_.beside(); ++k) {
        const int64_t from = sample * cell_.beside() + k, to = b * cell_.beside() + k;
        for (int64_t v = units_.begin; v < units_.end; ++v) {
          store(b_.carry_c + to * ldm_ + v * L, read(p_.dc_n, from * z_.H, v * L, z_.H));
          store(b_.c0 + to * ldm_ + v * L, read(p_.c0, from * z_.H, v * L, z_.H));
        }
      }
    }
  }

  // Words end inside a row: no product may read there what is no number. Nothing is written there later.
  void clear_ends() const {
    if (!kRounded || (gate_ == z_.H && whole_steps<E>(z_.R) == z_.R)) return;
    const Range own = part(s_.most_rows, team_.me, team_.members);
    const auto clear = [&](E* rows, int64_t stride) {
      __builtin_memset(rows + own.begin * stride, 0, own.size() * stride * sizeof(E));
    };
    clear(b_.dg_operand, operand_ldg_);
    if (z_.projected) clear(b_.dh_operand, operand_ldh_);
  }

  // Appends the rows of step t to the chunk's list; returns the number of rows so far.
  int64_t list_rows(const Item& item, int64_t t, int64_t rows) {
    const int64_t n = item.rows(t), pitch = p_.saved_stride, width = z_.D * z_.R;
    const int64_t before = item.d ? t + 1 : t - 1;  // the step whose states this one started from
    const int64_t known = before >= 0 && before < item.steps ? item.rows(before) : 0;
    const StepNoise<T> noise(p_.noise, z_, item, t);
    const S* saved = static_cast<const S*>(p_.saved) + item.d * z_.N * pitch;
    const T *y = static_cast<const T*>(p_.y) + item.d * z_.R, *h0 = static_cast<const T*>(p_.h0);
    for (int64_t b = 0; b < n; ++b, ++rows) {
      const int64_t at = z_.offset[t] + item.first + b;
      Row& row = b_.rows[rows];
      row.saved = saved + at * pitch;
      row.y = y + at * width;
      row.dy = p_.dy.data ? row_at<T>(p_.dy, z_.offset, t, item.first + b) + item.d * z_.R : nullptr;
      row.dc = p_.dc.data ? row_at<T>(p_.dc, z_.offset, t, item.first + b) + item.d * cell_.beside() * z_.H : nullptr;
      row.noise = noise.row(b);
      if (b < known) {
        const int64_t earlier = z_.offset[before] + item.first + b;
        row.h_prev = y + earlier * width;
        row.c_prev = saved + earlier * pitch + cell_.saved * z_.H;
        row.ldc = z_.H;
      } else {
        row.h_prev = h0 ? h0 + (item.d * z_.B + item.first + b) * z_.R : nullptr;
        row.c_prev = cell_.beside() ? b_.c0 + b * cell_.beside() * ldm_ : nullptr;
        row.ldc = ldm_;
      }
    }
    return rows;
  }

  // The mask of an item's sample b, or null.
  FUSEDRNN_INLINE const T* mask_of(const Item& item, int64_t b) const {
    const T* mask = static_cast<const T*>(p_.noise.mask_h);
    return mask ? mask + (item.d * z_.B + item.first + b) * z_.R : nullptr;
  }
  FUSEDRNN_INLINE static V with_mask(const T* mask, int64_t u, int64_t R, V v) {
    return mask ? masked(v, load<S>(mask + u, R - u)) : v;
  }

  FUSEDRNN_INLINE static V previous_h(const Row& row, int64_t u, int64_t R) {
    return row.h_prev ? load<S>(row.h_prev + u, R - u) : V(0);
  }

  // The carries of these samples, no longer than `clip`: each member scales its own part.
  void limit(Range samples) {
    S *of_h = b_.scale, *of_c = b_.scale + s_.most_samples;  // of_c: [samples][beside]
    const int others = cell_.beside();
    const auto scale_of = [&](const S* row, int64_t n) {
      return clip_factor(norm_of(row, n), static_cast<S>(p_.clip));
    };
    team_.meet();
    for (int64_t r = samples.begin; r < samples.end; ++r) {
      of_h[r] = scale_of(b_.carry_h + r * ldh_, z_.R);
      for (int64_t i = r * others; i < (r + 1) * others; ++i) of_c[i] = scale_of(b_.carry_c + i * ldm_, z_.H);
    }
    team_.meet();
    const auto scale = [](S* from, int64_t v, S by) { store(from + v * L, load(from + v * L) * V(by)); };
    for (int64_t r = samples.begin; r < samples.end; ++r) {
      for (int64_t v = outputs_.begin; v < outputs_.end; ++v) scale(b_.carry_h + r * ldh_, v, of_h[r]);
      for (int64_t i = r * others; i < (r + 1) * others; ++i) {
        for (int64_t v = units_.begin; v < units_.end; ++v) scale(b_.carry_c + i * ldm_, v, of_c[i]);
      }
    }
  }

  // Calls body(t, first chunk row of t, samples [begin, end) of t) for the part of the chunk in `own`.
  template <class Body>
  FUSEDRNN_INLINE static void for_steps(const Item& item, int64_t s0, int64_t s1, Range own, const Body& body) {
    int64_t row = 0;
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t t = time_of(item, s), n = item.rows(t);
      body(t, row, Range{max64(0, own.begin - row), min64(n, own.end - row)});
      row += n;
    }
  }

  // weight_gradients.inl
  WeightSums weight_sums(const Item& item, int index) const;
  void clear_weight_sums(const Item& item, int index, bool all) const;
  void weight_gradients(const Item& item, int index, int64_t s0, int64_t s1, int64_t rows, bool add);
  void gather_operands(const Item& item, int64_t s0, int64_t s1, Range own);
  void clear_operands(Range own, int64_t rows);
  V pairwise_sum(const S* column, int64_t rows) const;
  void add_slices();
  void add_slices_of(const S* slices, int64_t stride, int64_t n, void* result);

  void give_gate_gradients(const Item& item, int64_t s0, int64_t s1, int64_t rows) {
    const auto copy = [&](int64_t at, const S* from, int64_t n, void* to) {
      __builtin_memcpy(static_cast<S*>(to) + (item.d * z_.N + at) * n, from, n * sizeof(S));
    };
    for_steps(item, s0, s1, part(rows, team_.me, team_.members), [&](int64_t t, int64_t first, Range samples) {
      for (int64_t b = samples.begin; b < samples.end; ++b) {
        const int64_t at = z_.offset[t] + item.first + b;
        copy(at, b_.dg + (first + b) * ldg_, cell_.columns * z_.H, p_.dgates);
        if (z_.projected) copy(at, b_.dh + (first + b) * ldh_, z_.R, p_.dh);
      }
    });
  }

  void give_norms(const Item& item, int64_t s0, int64_t s1, int64_t rows) const {
    const NormColumns at = norm_columns(cell_.states, cell_.gates);
    const int64_t H = z_.H;
    for_steps(item, s0, s1, part(rows, team_.me, team_.members), [&](int64_t t, int64_t first, Range samples) {
      for (int64_t b = samples.begin; b < samples.end; ++b) {
        const int64_t r = first + b;
        S* to = static_cast<S*>(p_.norms) + (item.d * z_.N + z_.offset[t] + item.first + b) * at.count;
        const T* const dy = b_.rows[r].dy;
        to[at.sent] = norm_of(b_.sent_dh + r * ldh_, z_.R);
        to[at.total] = dy ? norm_of(b_.sent_dh + r * ldh_, z_.R, dy) : to[at.sent];
        for (int k = 0; k < cell_.beside(); ++k) {
          to[at.sent + 1 + k] = norm_of(b_.sent_dc + (r * cell_.beside() + k) * ldm_, H);
          to[at.total + 1 + k] = norm_of(b_.all_dc + (r * cell_.beside() + k) * ldm_, H);
        }
        const S* dg = b_.dg + r * ldg_;
        for (int g = 0; g < cell_.gates; ++g) to[at.gates + g] = norm_of(dg + argument(g) * H, H);
      }
    });
  }

  static S norm_of(const S* row, int64_t n, const T* more = nullptr) {  // of row, or of row + more
    const V sum = sum_of_squares<V>(n, L, [&](int64_t i) FUSEDRNN_INLINE_LAMBDA {
      const V v = load<S>(row + i, n - i);
      return more ? v + load<S>(more + i, n - i) : v;
    });
    S total = 0;
    for (int lane = 0; lane < L; ++lane) total += sum.v[lane];
    return norm(total);
  }

  void input_gradient(const Item& item, int64_t s0, int64_t s1, int64_t rows) {
    const Timed timed(Phase::kInputGradient);
    const Range own = part(rows, team_.me, team_.members);
    S** out = reinterpret_cast<S**>(b_.rows);  // the list of rows is not needed any more
    S* dx = static_cast<S*>(p_.dx_part[item.d]);
    for_steps(item, s0, s1, own, [&](int64_t t, int64_t first, Range samples) {
      for (int64_t b = samples.begin; b < samples.end; ++b) {
        out[first + b] = dx + (z_.offset[t] + item.first + b) * z_.I;
      }
    });
    const int shared = cell_.gates - cell_.split, from = shared > 0 ? 0 : cell_.gates;  // columns of dx that are drec
    const Inner gates =
        shared > 0 ? Inner{shared * gate_, cell_.split * gate_, cell_.gates * gate_} : Inner{cell_.gates * gate_};
    product<1>(
        weights(s_.w_ih[item.d], p_.weights[item.d].w_ih, 0, z_.I), gates, {0, ceil_div(z_.I, L)}, own,
        [&](int64_t r) { return b_.dg_operand + r * operand_ldg_ + from * gate_; },
        [&](int64_t r, int64_t u, int64_t n) FUSEDRNN_INLINE_LAMBDA { prefetch_to_write(out[r] + u, n); },
        [&](int64_t r, int64_t v, const V* acc, int) { store(out[r] + v * L, acc[0], z_.I - v * L); });
  }

  // After all items: dx of both directions together, in the type of x.
  void add_directions() const {
    if (z_.D == 1 && !kConvert) return;
    const Timed timed(Phase::kInputGradient);
    const S *forward = static_cast<const S*>(p_.dx_part[0]), *reverse = static_cast<const S*>(p_.dx_part[1]);
    const int64_t n = z_.N * z_.I;
    const Range own = part(ceil_div(n, L), thread_, s_.threads);
    for (int64_t i = own.begin * L; i < min64(n, own.end * L); i += L) {
      const V sum = load<S>(forward + i, n - i);
      store(static_cast<T*>(p_.dx) + i, z_.D == 2 ? sum + load<S>(reverse + i, n - i) : sum, n - i);
    }
  }

  void final_carries(const Item& item) {
    for (int64_t b = 0; b < item.samples(); ++b) {
      const int64_t sample = item.d * z_.B + item.first + b;
      T* dh0 = static_cast<T*>(p_.dh0) + sample * z_.R;
      for (int64_t u = outputs_.begin * L; u < min64(z_.R, outputs_.end * L); u += L) {
        store(dh0 + u, load(b_.carry_h + b * ldh_ + u), z_.R - u);
      }
      for (int k = 0; k < cell_.beside(); ++k) {
        T* dc0 = static_cast<T*>(p_.dc0) + (sample * cell_.beside() + k) * z_.H;
        for (int64_t u = units_.begin * L; u < min64(z_.H, units_.end * L); u += L) {
          store(dc0 + u, load(b_.carry_c + (b * cell_.beside() + k) * ldm_ + u), z_.H - u);
        }
      }
    }
  }

  // The column of the gradient of a gate's argument, its part of x.
  int argument(int gate) const {
    return cell_.first_argument + (gate < cell_.gates - cell_.gate_split ? gate : gate + cell_.gate_split);
  }

  const BackwardProblem& p_;
  const LayerSizes& z_;
  const Shared& s_;
  const CellConstants& cell_;
  const int thread_, index_;  // index of the team
  Team team_;
  TeamBuffers b_;
  Range units_, outputs_;  // own vectors of H and of R
  const int64_t ldg_, ldh_, ldm_;
  const int64_t gate_, operand_ldg_, operand_ldh_;  // distances of gates and rows in dg_operand, of rows in dh_operand
};
