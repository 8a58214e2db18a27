// Which rows each direction of a layer works on, step by step: the index arithmetic of the stepwise driver. Pure.
#pragma once

#include <algorithm>

#include "../problem.h"

namespace fusedrnn {

constexpr int kMaxSlots = 2;

// The rows of a time step, for each slot.
struct StepRows {
  int64_t rows[kMaxSlots];      // active samples
  int64_t first[kMaxSlots];     // their first row among all N
  int64_t carried[kMaxSlots];   // samples [0, carried) have a step before this one, in the direction's order
  int64_t previous[kMaxSlots];  // its first row
};

// The steps of each direction, a slot each, and their rows. In a direction's own order step i is at time i, or T-1-i.
struct Slots {
  int count;

  explicit Slots(const LayerSizes& z) : count(z.D) {}
  static int64_t time(const LayerSizes& z, int slot, int64_t i) { return slot ? z.T - 1 - i : i; }

  StepRows rows(const LayerSizes& z, int64_t i) const {
    StepRows at = {};
    for (int s = 0; s < count; ++s) {
      const int64_t t = time(z, s, i);
      at.rows[s] = z.active[t];
      at.first[s] = z.offset[t];
      if (i > 0) {
        const int64_t before = time(z, s, i - 1);
        at.carried[s] = std::min(z.active[t], z.active[before]);
        at.previous[s] = z.offset[before];
      }
    }
    return at;
  }
  int64_t most_rows(const StepRows& at) const { return count == 2 ? std::max(at.rows[0], at.rows[1]) : at.rows[0]; }

  // Rows [first, first + rows) of the steps [begin, end): they lie together in both orders.
  StepRows span(const LayerSizes& z, int64_t begin, int64_t end) const {
    StepRows at = {};
    for (int s = 0; s < count; ++s) {
      const int64_t low = std::min(time(z, s, begin), time(z, s, end - 1));
      const int64_t high = std::max(time(z, s, begin), time(z, s, end - 1));
      at.first[s] = z.offset[low];
      at.rows[s] = z.offset[high] + z.active[high] - z.offset[low];
    }
    return at;
  }
  // The end of the longest run of steps from `begin` on that has at most `limit` rows in each slot; one step at least.
  int64_t span_end(const LayerSizes& z, int64_t begin, int64_t limit) const {
    int64_t end = begin + 1, rows[kMaxSlots] = {};
    for (int s = 0; s < count; ++s) rows[s] = z.active[time(z, s, begin)];
    for (; end < z.T; ++end) {
      bool fits = true;
      for (int s = 0; s < count; ++s) fits = (rows[s] += z.active[time(z, s, end)]) <= limit && fits;
      if (!fits) break;
    }
    return end;
  }
};

}  // namespace fusedrnn
