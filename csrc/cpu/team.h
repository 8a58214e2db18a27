// What the forward and backward passes share: scratch memory, the team barrier, row lookup. Included after gemm.h.

template <class T>
struct ComputeType {
  using Type = T;
};
template <>
struct ComputeType<BFloat16> {  // stored in 16 bits, computed in float32
  using Type = float;
};

// What the products of a layer of type T read (operand.h).
template <class T>
struct OperandType {
#if defined(FUSEDRNN_PAIRED_TABLE)
  using Type = T;
#else
  using Type = typename ComputeType<T>::Type;
#endif
};

// The types of a layer, by the type of its tensors if all are of one.
template <class T>
struct LayerTypes {
  using Element = T;  // of the tensors, all but the weights
  using Weight = T;   // of the matrices
  using Compute = typename ComputeType<T>::Type;
  using Operand = typename OperandType<T>::Type;  // what products read
  using Panel = Operand;                          // packed weights
};
// Matrices of bfloat16 in a layer of float32, multiplied in float32.
struct BFloat16Weights {};
template <>
struct LayerTypes<BFloat16Weights> {
  using Element = float;
  using Weight = BFloat16;
  using Compute = float;
  using Operand = float;
  using Panel = BFloat16;
};
// Matrices of int8, with a scale for each row, in a layer of float32.
struct Int8Weights {};
template <>
struct LayerTypes<Int8Weights> {
  using Element = float;
  using Weight = int8_t;
  using Compute = float;
  using Operand = int8_t;
  using Panel = int8_t;
};

// Hands out pieces of one block. With a null base it only measures. Each piece starts on a cache line and may be
// read up to a tile's width past its end.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class P>
  P* take(int64_t n) {
    P* piece = base_ ? reinterpret_cast<P*>(base_ + used_) : nullptr;
    used_ += ceil_div(n * static_cast<int64_t>(sizeof(P)) + kTileWidth * FUSEDRNN_VECTOR_BYTES, 64) * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Elements between rows of scratch memory: whole vectors may be stored at the end of a row.
template <class S>
FUSEDRNN_INLINE int64_t row_stride(int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(S);
  return spread_stride(ceil_div(n, kLine) * kLine, sizeof(S));
}

struct alignas(64) Flag {
  int64_t epoch;
};

// A few threads that meet. Each writes its own flag and waits for the others': one cache line a member.
class Team {
 public:
  Team(Flag* flags, int me, int members) : me(me), members(members), flags_(flags) {}

  void meet() {
    if (members == 1) return;
    const Timed timed(Phase::kWait);
    ++epoch_;
    __atomic_store_n(&flags_[me].epoch, epoch_, __ATOMIC_RELEASE);
    for (int other = 0; other < members; ++other) {
      for (int spins = 0; __atomic_load_n(&flags_[other].epoch, __ATOMIC_ACQUIRE) < epoch_; ++spins) {
        if (spins < kSpins) pause();
        else sched_yield();  // more threads than cores: let the late one run
      }
    }
  }

  const int me, members;

 private:
  static constexpr int kSpins = 1000;
  FUSEDRNN_INLINE static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  Flag* flags_;
  int64_t epoch_ = 0;
};

// How the threads of a layer share it, and their memory: a block that all share, then one for each team.
struct SharedPass {
  Plan plan;
  int64_t bounds[kMaxThreads + 1];  // of the slices of the batch
  int threads;
  char* block;
  int64_t shared_bytes, team_bytes;
  int64_t most_samples, most_rows;
  Flag* flags;

  // For the threads that OpenMP has started, which may be fewer than asked for.
  void share(const LayerSizes& z, int gates, int lanes, int came) {
    threads = came;
    if (came < plan.teams * plan.members) plan = make_plan(z, gates, lanes, came);
    slice_batch(z, plan.slices, bounds);
    most_samples = 0;
    for (int k = 0; k < plan.slices; ++k) most_samples = max64(most_samples, bounds[k + 1] - bounds[k]);
  }
  // carve_shared(carver) and carve_team(carver) take what they need; false: no memory.
  template <class CarveShared, class CarveTeam>
  bool allocate(const CarveShared& carve_shared, const CarveTeam& carve_team) {
    Carver shared(nullptr), team(nullptr);
    carve_shared(shared);
    carve_team(team);
    shared_bytes = shared.used();
    team_bytes = team.used();
    block = static_cast<char*>(acquire_scratch(shared_bytes + plan.teams * team_bytes));
    if (!block) return false;
    Carver pieces(block);
    carve_shared(pieces);
    for (int i = 0; i < plan.teams * plan.members; ++i) flags[i].epoch = 0;
    return true;
  }
};

#include "order.h"

// All threads of the parallel region.
inline void meet_all() {
  const Timed timed(Phase::kWait);
  before_others();
#pragma omp barrier
  after_others();
}

// One parallel region of at most `threads` threads: prepare(how many came) on one of them, then, if it returns true,
// body(index) on all. Returns what prepare did.
template <class Prepare, class Body>
bool in_parallel(int threads, const Prepare& prepare, const Body& body) {
  bool prepared = false;
  before_others();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    after_others();
    const Timed timed(Phase::kOther);
#pragma omp master
    prepared = prepare(omp_get_num_threads());
    meet_all();
    if (prepared) body(omp_get_thread_num());
    before_others();
  }
  after_others();
  return prepared;
}

template <class T>
FUSEDRNN_INLINE const T* row_at(const RowView& view, const int64_t* offset, int64_t t, int64_t b) {
  const int64_t step = view.time < 0 ? offset[t] * view.batch : t * view.time;
  return static_cast<const T*>(view.data) + step + b * view.batch;
}

// One direction of one slice of the batch: what a team works through.
struct Item {
  int d;
  int64_t first, last;  // samples [first, last)
  int64_t steps;        // steps with at least one active sample
  const int64_t* active;

  Item(const LayerSizes& size, const int64_t* bounds, int slices, int index)
      : d(index / slices), first(bounds[index % slices]), last(bounds[index % slices + 1]), steps(0),
        active(size.active) {
    while (steps < size.T && active[steps] > first) ++steps;
  }
  FUSEDRNN_INLINE int64_t samples() const { return last - first; }
  FUSEDRNN_INLINE int64_t rows(int64_t t) const { return min64(active[t], last) - first; }  // active at step t
};

// How threads share the packing of weights.
struct Packing {
  const Plan& plan;
  int thread, threads;

  // Of an operand whose panels begin at vector 0, whoever reads them: the vectors this thread packs.
  Range any(int64_t vectors, int group_vectors) const {
    const Range panels = part(ceil_div(vectors, group_vectors), thread, threads);
    return {panels.begin * group_vectors, min64(vectors, panels.end * group_vectors)};
  }
  // Of direction d's operand that each member of a team reads for units of its own, from a panel of its own on.
  Range own(int d, int64_t vectors, int group_vectors) const {
    if (plan.members == 1) return any(vectors, group_vectors);
    if (d % plan.teams != thread / plan.members) return {0, 0};
    return part(vectors, thread % plan.members, plan.members);
  }
};
