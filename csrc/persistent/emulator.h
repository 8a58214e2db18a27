// A GPU for one kernel, on the host: the second of the two machines that the persistent kernels run on (the first is
// cuda/machine.cuh). Every thread of a cluster is a fiber; which one goes on is drawn from a seed wherever one has to
// wait. What a kernel may do:
//
//   thread(), rank()                 in the block; the block's place in its cluster
//   cluster(), slot()                which tile of samples, which direction
//   shared<E>(bytes), as<E>(p)       a place in the block's shared memory; the same place as another type
//   load, store, load_quad, ...      of one element, of four registers
//   store_everywhere(p, v)           at the same place of every block of the cluster
//   shuffle_xor(v, mask)             between the lanes of a warp, all of which must take part; so must they in
//   multiply_halves, multiply_tf32   mma.sync.m16n8k16 (bf16 or fp16) and m16n8k8 (tf32), c += a b
//   converge()                       before these: brings the lanes of a warp together, and orders no memory
//   group_sync(group, threads)       a barrier of some warps of a block
//   cluster_arrive, cluster_wait     the two halves of a barrier of the whole cluster; of one block, wait is all of it
//
// It stops a kernel, with a message, at the first
//   race: an access to a word of shared memory that another thread has accessed, one of the two to write, with no
//   barrier between them; a barrier orders just those threads that pass it; read of shared memory that nobody has
//   written, or beyond its end; collective that not all lanes of a warp come to, barrier that not all threads come to.
//
// What it does not have: time, memory order within a thread's own accesses, more than one cluster at a time, and the
// rounding of a tensor core's sums, which here are those of double, rounded to float once a product.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#include "products.h"

namespace fusedrnn::persistent {

class EmulatedCluster;

struct EmulatedGrid {
  int clusters, slots, blocks, threads;
  int64_t shared_bytes;
  uint64_t seed;
};

// A place in a block's shared memory.
template <class E>
struct SharedPlace {
  int64_t byte;
  SharedPlace operator+(int64_t elements) const { return {byte + elements * static_cast<int64_t>(sizeof(E))}; }
};

// A thread, as the kernel sees it.
class EmulatedThread {
 public:
  EmulatedThread(EmulatedCluster* owner, int cluster, int slot, int rank, int thread)
      : owner_(owner), cluster_(cluster), slot_(slot), rank_(rank), thread_(thread) {}
  int thread() const { return thread_; }
  int rank() const { return rank_; }
  int cluster() const { return cluster_; }
  int slot() const { return slot_; }

  template <class E>
  SharedPlace<E> shared(int64_t byte) const {
    return {byte};
  }
  template <class E, class F>
  SharedPlace<E> as(SharedPlace<F> place) const {
    return {place.byte};
  }
  template <class E>
  E load(SharedPlace<E> place) {
    E value;
    read(place.byte, &value, sizeof value);
    return value;
  }
  template <class E>
  void store(SharedPlace<E> place, E value) {
    write(rank_, place.byte, &value, sizeof value);
  }
  Quad load_quad(SharedPlace<uint32_t> place) {
    Quad value;
    read(place.byte, &value, sizeof value);
    return value;
  }
  void store_quad(SharedPlace<uint32_t> place, const Quad& value) { write(rank_, place.byte, &value, sizeof value); }
  template <class E>
  void store_everywhere(SharedPlace<E> place, E value) {
    for (int rank = 0; rank < blocks(); ++rank) write(rank, place.byte, &value, sizeof value);
  }

  float shuffle_xor(float v, int mask);
  template <class T>
  void multiply_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
    const auto widened = [](uint16_t bits) {
      T value;
      static_assert(sizeof value == sizeof bits);
      std::memcpy(&value, &bits, sizeof bits);
      return widen(value);
    };
    multiply(c, a, b0, b1, 16, widened);
  }
  void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply(c, a, b0, b1, 8, {}); }

  void converge() const {}
  void group_sync(int group, int threads);
  void cluster_arrive();
  void cluster_wait();

 private:
  int blocks() const;
  void read(int64_t byte, void* value, int64_t bytes);
  void write(int rank, int64_t byte, const void* value, int64_t bytes);
  using Widened = float (*)(uint16_t);
  void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int depth, Widened widened);

  EmulatedCluster* owner_;
  int cluster_, slot_, rank_, thread_;
};

// Runs the kernel for every cluster and slot, one after the other. Throws std::runtime_error with what it found.
void emulate(const EmulatedGrid& grid, const std::function<void(EmulatedThread&)>& kernel);

}  // namespace fusedrnn::persistent
