// See emulator.h.
#undef _FORTIFY_SOURCE  // its longjmp refuses to go from one stack to another
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedrnn::persistent {
namespace {

constexpr int64_t kWord = 2, kStackBytes = 64 << 10;

// What a thread had passed when it made an access. It comes before what another thread does later if a barrier is
// between them: one that this thread has reached since, and the other has left.
struct Access {
  int rank, thread;
  int64_t block_syncs, group_syncs, arrivals;
};

// The accesses to a word that others must not meet without a barrier: the last write, and the reads since.
struct Word {
  bool written = false;
  Access writer;
  std::vector<Access> readers;
};

struct Warp {
  enum Kind { kNothing, kShuffle, kHalves, kTf32 };
  Kind kind = kNothing;
  int mask = 0;
  int arrived = 0;
  std::vector<int> waiting;
  float values[kLanes], results[kLanes];
  float* c[kLanes];
  uint32_t a[kLanes][4], b[kLanes][2];
};

struct Barrier {
  int arrived = 0;
  std::vector<int> waiting;
};

// Where a fiber, or `run`, goes on: at first by its context, then, as that asks the system for the signals each time,
// by a jump.
struct Point {
  ucontext_t context;
  jmp_buf jump;
  bool begun = false;
};

struct Fiber {
  Point place;
  std::optional<EmulatedThread> thread;
  int group = -1;
  int64_t block_syncs = 0, group_syncs = 0, arrivals = 0, waits = 0;
  const char* waits_for = nullptr;
  bool done = false;
};

}  // namespace

class EmulatedCluster {
 public:
  EmulatedCluster(const EmulatedGrid& grid, const std::function<void(EmulatedThread&)>& kernel)
      : grid_(grid), kernel_(kernel), fibers_(grid.blocks * grid.threads) {
    const int64_t stack_bytes = kStackBytes * static_cast<int64_t>(fibers_.size());
    stacks_.reset(new char[stack_bytes]);
    memory_.resize(grid.blocks);
    words_.resize(grid.blocks);
  }

  // The next cluster, all of its threads at the kernel's beginning.
  void begin(int cluster, int slot) {
    random_.seed(grid_.seed * 1000003 + cluster * 2 + slot);
    ready_.clear();
    for (int i = 0; i < static_cast<int>(fibers_.size()); ++i) {
      fibers_[i] = Fiber{};
      fibers_[i].thread.emplace(this, cluster, slot, i / grid_.threads, i % grid_.threads);
      ready_.push_back(i);
    }
    for (auto& memory : memory_) memory.assign(grid_.shared_bytes, 0xff);
    for (auto& words : words_) {
      words.resize((grid_.shared_bytes + kWord - 1) / kWord);
      for (Word& word : words) word.written = false, word.readers.clear();
    }
    const int warps = grid_.blocks * grid_.threads / kLanes;
    warps_.assign(warps, {});
    groups_.assign(warps, {});
    blocks_.assign(grid_.blocks, {});
    cluster_ = {};
    cluster_phase_ = 0;
  }

  // Until all threads are done, or one has found something.
  void run() {
    EmulatedCluster* const outer = current_;
    current_ = this;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      ucontext_t& context = fibers_[i].place.context;
      getcontext(&context);
      context.uc_stack.ss_sp = stacks_.get() + i * kStackBytes;
      context.uc_stack.ss_size = kStackBytes;
      context.uc_link = nullptr;
      makecontext(&context, enter, 0);
    }
    main_.begun = true;
    go_on(main_);
    current_ = outer;
    if (error_.empty()) {
      for (const Fiber& fiber : fibers_) {
        if (!fiber.done) error_ = deadlock();
      }
    }
    if (!error_.empty()) throw std::runtime_error("fusedrnn: emulated kernel: " + error_);
  }

  int blocks() const { return grid_.blocks; }

  void access(int to, int64_t byte, int64_t bytes, bool writes) {
    const Fiber& fiber = fibers_[running_];
    const int rank = fiber.thread->rank(), thread = fiber.thread->thread();
    if (byte < 0 || byte + bytes > grid_.shared_bytes || byte % std::min<int64_t>(bytes, 16)) {
      fail(said() << "reaches bytes " << byte << " to " << byte + bytes << " of " << grid_.shared_bytes
                  << " of shared memory");
    }
    const Access now = {rank, thread, fiber.block_syncs, fiber.group_syncs, fiber.arrivals};
    for (int64_t i = byte / kWord; i < (byte + bytes + kWord - 1) / kWord; ++i) {
      Word& word = words_[to][i];
      if (!word.written && !writes) fail(said() << "reads byte " << i * kWord << ", which nobody has written");
      if (word.written && !before(word.writer, fiber)) race(i, writes ? "writes" : "reads", word.writer, "wrote");
      if (writes) {
        for (const Access& reader : word.readers) {
          if (!before(reader, fiber)) race(i, "writes", reader, "read");
        }
        word.written = true;
        word.writer = now;
        word.readers.clear();
      } else {
        bool known = false;
        for (Access& reader : word.readers) {
          if (reader.rank == rank && reader.thread == thread) reader = now, known = true;
        }
        if (!known) word.readers.push_back(now);
      }
    }
  }
  unsigned char* at(int rank, int64_t byte) { return memory_[rank].data() + byte; }

  Warp& join(Warp::Kind kind, int mask) {
    Warp& warp = warps_[running_ / kLanes];
    if (warp.arrived > 0 && (warp.kind != kind || warp.mask != mask)) {
      fail(said() << "comes to another collective than other lanes of its warp");
    }
    warp.kind = kind;
    warp.mask = mask;
    return warp;
  }
  // True for the lane that comes last, which does the work of all before it calls finish.
  bool last(Warp& warp) { return ++warp.arrived == kLanes; }
  void finish(Warp& warp) {
    warp.arrived = 0;
    release(warp.waiting);
  }
  void wait(Warp& warp) {
    warp.waiting.push_back(running_);
    wait("the other lanes of its warp");
  }

  void block_sync() {
    Fiber& fiber = fibers_[running_];
    Barrier& barrier = blocks_[fiber.thread->rank()];
    pass(barrier, grid_.threads, "a barrier of its block");
    ++fiber.block_syncs;
  }
  void group_sync(int group, int threads) {
    Fiber& fiber = fibers_[running_];
    if (group < 0 || group >= grid_.threads / kLanes || (fiber.group >= 0 && fiber.group != group)) {
      fail(said() << "comes to barrier " << group << ", after barrier " << fiber.group);
    }
    fiber.group = group;
    pass(groups_[fiber.thread->rank() * (grid_.threads / kLanes) + group], threads, "a barrier of some warps");
    ++fiber.group_syncs;
  }
  void cluster_arrive() {
    if (grid_.blocks == 1) return;
    Fiber& fiber = fibers_[running_];
    if (fiber.arrivals != fiber.waits) fail(said() << "arrives at the cluster's barrier twice");
    ++fiber.arrivals;
    if (++cluster_.arrived == static_cast<int>(fibers_.size())) {
      cluster_.arrived = 0;
      ++cluster_phase_;
      release(cluster_.waiting);
    }
  }
  void cluster_wait() {
    if (grid_.blocks == 1) return block_sync();
    Fiber& fiber = fibers_[running_];
    if (fiber.arrivals != fiber.waits + 1) fail(said() << "waits at the cluster's barrier before it has arrived");
    if (cluster_phase_ < fiber.arrivals) {
      cluster_.waiting.push_back(running_);
      wait("the cluster's barrier");
    }
    ++fiber.waits;
  }
  int lane() const { return running_ % kLanes; }

 private:
  std::ostringstream said() const {
    std::ostringstream text;
    const EmulatedThread& thread = *fibers_[running_].thread;
    text << "thread " << thread.thread() << " of block " << thread.rank() << " ";
    return text;
  }
  [[noreturn]] void fail(const std::ostream& text) {
    error_ = static_cast<const std::ostringstream&>(text).str();
    _longjmp(main_.jump, 1);
  }
  [[noreturn]] void race(int64_t word, const char* does, const Access& other, const char* did) {
    fail(said() << does << " byte " << word * kWord << " of shared memory, which thread " << other.thread
                << " of block " << other.rank << " " << did << ", with no barrier between them");
  }
  std::string deadlock() const {
    std::ostringstream text;
    text << "no thread can go on:";
    int told = 0;
    for (const Fiber& fiber : fibers_) {
      if (fiber.done || told == 4) continue;
      text << (told++ ? ", " : " ") << "thread " << fiber.thread->thread() << " of block " << fiber.thread->rank()
           << " waits for " << fiber.waits_for;
    }
    return text.str();
  }

  // Whether a barrier orders the access before what the fiber does now.
  bool before(const Access& access, const Fiber& fiber) const {
    const EmulatedThread& thread = *fiber.thread;
    const int group = fibers_[access.rank * grid_.threads + access.thread].group;
    const bool same_block = access.rank == thread.rank();
    if (same_block && access.thread == thread.thread()) return true;
    if (same_block && access.block_syncs < fiber.block_syncs) return true;
    if (same_block && group == fiber.group && access.group_syncs < fiber.group_syncs) return true;
    return access.arrivals < fiber.waits;
  }

  void pass(Barrier& barrier, int threads, const char* name) {
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      return release(barrier.waiting);
    }
    barrier.waiting.push_back(running_);
    wait(name);
  }
  void release(std::vector<int>& waiting) {
    ready_.insert(ready_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }
  void wait(const char* name) {
    fibers_[running_].waits_for = name;
    go_on(fibers_[running_].place);
  }
  // To a thread that can go on, drawn by chance; to `run` where there is none.
  void go_on(Point& from) {
    Point* to = &main_;
    if (!ready_.empty()) {
      const size_t i = random_() % ready_.size();
      running_ = ready_[i];
      ready_[i] = ready_.back();
      ready_.pop_back();
      to = &fibers_[running_].place;
    }
    if (to == &from || _setjmp(from.jump)) return;  // gone on with
    if (to->begun) _longjmp(to->jump, 1);
    to->begun = true;
    setcontext(&to->context);
  }
  static void enter() {
    EmulatedCluster& self = *current_;
    const int own = self.running_;
    self.kernel_(*self.fibers_[own].thread);
    self.fibers_[own].done = true;
    self.go_on(self.fibers_[own].place);
    std::abort();  // not reached: nobody goes on with it
  }

  static thread_local EmulatedCluster* current_;

  const EmulatedGrid& grid_;
  const std::function<void(EmulatedThread&)>& kernel_;
  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  std::unique_ptr<char[]> stacks_;
  std::vector<int> ready_;
  int running_ = 0;
  Point main_;
  std::string error_;
  std::vector<std::vector<unsigned char>> memory_;
  std::vector<std::vector<Word>> words_;
  std::vector<Warp> warps_;
  std::vector<Barrier> groups_, blocks_;
  Barrier cluster_;
  int64_t cluster_phase_ = 0;
};

thread_local EmulatedCluster* EmulatedCluster::current_ = nullptr;

int EmulatedThread::blocks() const { return owner_->blocks(); }

void EmulatedThread::read(int64_t byte, void* value, int64_t bytes) {
  owner_->access(rank_, byte, bytes, false);
  std::memcpy(value, owner_->at(rank_, byte), bytes);
}

void EmulatedThread::write(int rank, int64_t byte, const void* value, int64_t bytes) {
  owner_->access(rank, byte, bytes, true);
  std::memcpy(owner_->at(rank, byte), value, bytes);
}

float EmulatedThread::shuffle_xor(float v, int mask) {
  Warp& warp = owner_->join(Warp::kShuffle, mask);
  const int lane = owner_->lane();
  warp.values[lane] = v;
  if (owner_->last(warp)) {
    for (int i = 0; i < kLanes; ++i) warp.results[i] = warp.values[i ^ mask];
    owner_->finish(warp);
  } else {
    owner_->wait(warp);
  }
  return warp.results[lane];
}

void EmulatedThread::multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int depth,
                              Widened widened) {
  Warp& warp = owner_->join(depth == 16 ? Warp::kHalves : Warp::kTf32, 0);
  const int own = owner_->lane();
  std::copy_n(a, 4, warp.a[own]);
  warp.b[own][0] = b0, warp.b[own][1] = b1;
  warp.c[own] = c;
  if (!owner_->last(warp)) return owner_->wait(warp);
  double left[16][16] = {}, right[16][8] = {};  // [row][k], [k][column]
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r & 1), half = r >> 1;
      const uint32_t av = warp.a[lane][r], bv = warp.b[lane][half];
      if (depth == 16) {
        for (int i = 0; i < 2; ++i) {
          left[row][8 * half + 2 * t + i] = widened(static_cast<uint16_t>(av >> (16 * i)));
          right[8 * half + 2 * t + i][g] = widened(static_cast<uint16_t>(bv >> (16 * i)));
        }
      } else {  // the unit reads the upper 19 bits
        left[row][4 * half + t] = float_of(av & 0xffffe000u);
        right[4 * half + t][g] = float_of(bv & 0xffffe000u);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    double sums[8] = {};
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) sums[column] += left[row][k] * right[k][column];
    }
    for (int column = 0; column < 8; ++column) {
      float& to = warp.c[row % 8 * 4 + column / 2][row / 8 * 2 + column % 2];
      to = static_cast<float>(to + sums[column]);
    }
  }
  owner_->finish(warp);
}

void EmulatedThread::group_sync(int group, int threads) { owner_->group_sync(group, threads); }
void EmulatedThread::cluster_arrive() { owner_->cluster_arrive(); }
void EmulatedThread::cluster_wait() { owner_->cluster_wait(); }

void emulate(const EmulatedGrid& grid, const std::function<void(EmulatedThread&)>& kernel) {
  EmulatedCluster emulated(grid, kernel);
  for (int slot = 0; slot < grid.slots; ++slot) {
    for (int cluster = 0; cluster < grid.clusters; ++cluster) {
      emulated.begin(cluster, slot);
      emulated.run();
    }
  }
}

}  // namespace fusedrnn::persistent
